"""Keys and values of the sequences that decode: one slot a sequence, each with its own length.

A decode step writes one column per slot in place, a sequence that leaves is overwritten by the last one, and a
sequence that joins takes the next slot; nothing else moves. Buffers grow in blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Layers: TypeAlias = Sequence[tuple[Tensor, Tensor]]
"""Keys and values per layer, each (1, heads, columns, head size)."""

# Columns are allocated this many at a time.
_BLOCK = 128


@dataclass(frozen=True, slots=True)
class Prefix:
    """What the first ``length`` columns of a sequence left in every layer; shared, never written to.

    Attributes:
        layers: of those columns that stand behind ``before``.
        before: the columns before them, where they are kept apart; None if there are none.
    """

    layers: Layers
    length: int
    before: Prefix | None = None

    def cut(self, length: int) -> Prefix:
        """Its first columns alone; nothing is copied."""
        kept = self
        while kept.before is not None and length <= kept.before.length:
            kept = kept.before
        own = length - (kept.before.length if kept.before else 0)
        layers = [(keys[:, :, :own], values[:, :, :own]) for keys, values in kept.layers]
        return Prefix(layers, length, kept.before)

    def pieces(self, layer: int) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of a layer, piece by piece in the order of their columns."""
        both = [piece.layers[layer] for piece in self._chain()]
        return [keys for keys, _ in both], [values for _, values in both]

    def whole(self) -> Prefix:
        """The same in one piece; copied unless it is one."""
        if self.before is None:
            return self
        both = [self.pieces(layer) for layer in range(len(self.layers))]
        return Prefix([(torch.cat(keys, dim=2), torch.cat(values, dim=2)) for keys, values in both], self.length)

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for piece in self._chain() for keys, values in piece.layers)

    def _chain(self) -> list[Prefix]:
        found = [self]
        while (before := found[-1].before) is not None:
            found.append(before)
        return found[::-1]


def column_bytes(prefix: Prefix) -> int:
    """Bytes that one column of one sequence takes over all layers."""
    return prefix.nbytes // max(1, prefix.length)


class KVSlots:
    """Buffers per layer, shaped (slots, heads, columns, head size).

    Args:
        most: slots there may ever be.
        column_bytes: what one column of one slot takes over all layers.
        budget: bytes that the buffers keep to where they have more than they need; a single slot may take more.

    Attributes:
        lengths: columns in use, slot by slot.
        version: another number whenever the buffers are others.
    """

    def __init__(self, most: int, column_bytes: int = 0, budget: int = 2**62) -> None:
        self.lengths: list[int] = []
        self.version = 0
        self._most, self._column_bytes, self._budget = most, column_bytes, budget
        self._layers: list[tuple[Tensor, Tensor]] = []
        self._at: tuple[Tensor, Tensor] | None = None
        self._view = (0, 0)

    @property
    def columns(self) -> int:
        """Columns allocated for every slot."""
        # Of the last layer: where memory ran out while they grew, those before it are larger already.
        return self._layers[-1][0].shape[2] if self._layers else 0

    def bytes_after_step(self) -> int:
        """What the buffers will take with one more column in every slot."""
        return self.bytes_for(len(self.lengths), max(self.lengths) + 1) if self.lengths else 0

    def bytes_for(self, slots: int, columns: int) -> int:
        """What the buffers take when they hold so many slots, the longest with so many columns."""
        rows, width = self._allocation(slots, columns)
        return rows * width * self._column_bytes

    def add(self, prefix: Prefix) -> None:
        """Give a sequence the next slot, with room for one more column."""
        slot, layers = len(self.lengths), prefix.whole().layers
        self._reserve(slot + 1, prefix.length + 1, layers)
        for (keys, values), (new_keys, new_values) in zip(self._layers, layers, strict=True):
            keys[slot, :, : prefix.length] = new_keys[0]
            values[slot, :, : prefix.length] = new_values[0]
        self.lengths.append(prefix.length)

    def reserve(self) -> None:
        """Make room for one more column in every slot and note where it goes."""
        self._reserve(len(self.lengths), max(self.lengths) + 1, self._layers)
        device = self._layers[0][0].device
        self._at = (torch.arange(len(self.lengths), device=device), torch.tensor(self.lengths, device=device))
        self._view = (len(self.lengths), max(self.lengths) + 1)

    def rounded(self) -> tuple[int, int]:
        """KVSlots and columns that a step needs after :meth:`reserve`, rounded up within the buffers to few values."""
        rows = 1 << (len(self.lengths) - 1).bit_length()
        columns = -(-(max(self.lengths) + 1) // _BLOCK) * _BLOCK
        return min(rows, self._layers[-1][0].shape[0]), min(columns, self.columns)

    def place(self, lengths: Tensor, columns: int) -> None:
        """Let the next step write behind ``lengths``, one for each of the first slots, and see ``columns`` columns."""
        self._at = (torch.arange(len(lengths), device=lengths.device), lengths)
        self._view = (len(lengths), columns)

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put one column (slots, heads, head size) behind every slot; all columns (slots, heads, columns, size)."""
        if self._at is None:
            raise RuntimeError("reserve() comes before write()")
        count, end = self._view
        all_keys, all_values = self._layers[layer]
        rows, columns = self._at
        all_keys[rows, :, columns] = keys
        all_values[rows, :, columns] = values
        return all_keys[:count, :, :end], all_values[:count, :, :end]

    def prefix(self, slot: int) -> Prefix:
        """What a sequence has here, to be read before anything is written or moved."""
        length = self.lengths[slot]
        layers = [
            (keys[slot : slot + 1, :, :length], values[slot : slot + 1, :, :length]) for keys, values in self._layers
        ]
        return Prefix(layers, length)

    @property
    def nbytes(self) -> int:
        """What the buffers take."""
        return sum(keys.nbytes + values.nbytes for keys, values in self._layers)

    def advance(self) -> None:
        """Count the column that a decode step has written to every slot."""
        self.lengths = [length + 1 for length in self.lengths]
        self._at = None

    def blank(self, slot: int) -> None:
        """Zero what a sequence has written that is not finite: even masked it would spoil those that come after it."""
        for keys, values in self._layers:
            keys[slot].zero_()
            values[slot].zero_()

    def remove(self, slot: int) -> None:
        """Free a slot; the last sequence takes its place, and an empty cache gives its memory back."""
        last = len(self.lengths) - 1
        length = self.lengths.pop()
        if slot != last:
            for keys, values in self._layers:
                keys[slot, :, :length] = keys[last, :, :length]
                values[slot, :, :length] = values[last, :, :length]
            self.lengths[slot] = length
        if not self.lengths:
            self._layers = []
            self.version += 1

    def _allocation(self, slots: int, columns: int) -> tuple[int, int]:
        """KVSlots and columns of the buffers that hold so many."""
        have = self._layers[-1][0].shape[0] if self._layers else 0
        width = max(self.columns, -(-columns // _BLOCK) * _BLOCK)
        # Doubling keeps the copies few while sequences come one by one; where memory is short, none is spare.
        rows = have if slots <= have else min(max(slots, 2 * have), self._most)
        return (rows if rows * width * self._column_bytes <= self._budget else slots), width

    def _reserve(self, slots: int, columns: int, like: Layers) -> None:
        have = self._layers[-1][0].shape[0] if self._layers else 0
        if slots <= have and columns <= self.columns:
            return
        self.version += 1
        rows, width = self._allocation(slots, columns)
        if not self._layers:
            self._layers = [(_grown(keys, rows, width), _grown(values, rows, width)) for keys, values in like]
            return
        used, longest = len(self.lengths), max(self.lengths)
        # Layer by layer, so that old and new buffers never stand side by side in full.
        for layer, (keys, values) in enumerate(self._layers):
            if keys.shape[0] >= rows and keys.shape[2] >= width:
                continue
            self._layers[layer] = (
                _grown(keys, rows, width, used, longest),
                _grown(values, rows, width, used, longest),
            )


def _grown(buffer: Tensor, rows: int, columns: int, used: int = 0, longest: int = 0) -> Tensor:
    """A larger buffer with the used corner of this one."""
    _, heads, _, size = buffer.shape
    # Zeros, not garbage: a masked NaN would still spoil the sum it is weighted into with 0.
    grown = torch.zeros((rows, heads, columns, size), dtype=buffer.dtype, device=buffer.device)
    grown[:used, :, :longest] = buffer[:used, :, :longest]
    return grown
