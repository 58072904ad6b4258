"""Keys and values of the sequences that decode: one slot a sequence, each with its own length.

A decode step writes one column per slot in place, a sequence that leaves is overwritten by the last one of its group,
and a sequence that joins takes the next row of the group of its width; nothing else moves but what outgrows its group.
Buffers grow in blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Layers: TypeAlias = Sequence[tuple[Tensor, Tensor]]
"""Keys and values per layer, each (1, heads, columns, head size)."""

Shape: TypeAlias = tuple[tuple[int, int], ...]
"""Slots and columns of each group."""

# Columns are allocated this many at a time.
_BLOCK = 128
# Sequences of up to so many columns are one group, each further group takes up to so many times the columns of the one
# before. More groups would save some masked columns and cost each layer of each step one more call of attention.
_NARROWEST, _RATIO = 512, 4


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
    """A slot for each sequence, in groups of about one width; used by the decode thread alone.

    A buffer is as wide as its longest sequence, for all its rows. So a long sequence gets neighbours of its own size: a
    group takes up to four times the columns of the one before, and one that outgrows its group moves to the next.
    The order of a step is group by group, see :attr:`order`.

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
        self._groups: list[_Group] = []
        self._step: list[_Write] = []

    @property
    def order(self) -> list[int]:
        """The slots in the order of a step's columns."""
        return [slot for group in self._groups for slot in group.slots]

    @property
    def step_lengths(self) -> list[int]:
        """Columns in use, in that order."""
        return [self.lengths[slot] for slot in self.order]

    @property
    def group_sizes(self) -> list[int]:
        """Sequences of each group, in that order."""
        return [len(group.slots) for group in self._groups]

    @property
    def nbytes(self) -> int:
        """What the buffers take."""
        return sum(group.nbytes for group in self._groups)

    def bytes_after_step(self) -> int:
        """What the buffers will take with one more column in every slot."""
        return self.bytes_for([])

    def bytes_for(self, coming: Sequence[int]) -> int:
        """What they will take when so many columns of further sequences have come besides."""
        wanted: dict[int, list[int]] = {}
        for columns in [*(length + 1 for length in self.lengths), *coming]:
            wanted.setdefault(_bound(columns), []).append(columns)
        total = 0
        for bound, lengths in sorted(wanted.items()):
            rows, width = self._allocation(self._of(bound), len(lengths), max(lengths), total)
            total += rows * width * self._column_bytes
        return total

    def add(self, prefix: Prefix) -> None:
        """Give a sequence the next slot, with room for one more column."""
        self._enter(len(self.lengths), prefix)
        self.lengths.append(prefix.length)

    def prefix(self, slot: int) -> Prefix:
        """What a sequence has here, to be read before anything is written or moved."""
        group, row = self._place(slot)
        own, length = slice(row, row + 1), self.lengths[slot]
        return Prefix([(keys[own, :, :length], values[own, :, :length]) for keys, values in group.layers], length)

    def reserve(self) -> None:
        """Make room for one more column in every slot and note where it goes; may change :attr:`order`."""
        for slot, length in enumerate(self.lengths):
            group, row = self._place(slot)
            if length + 1 > group.bound:
                self._enter(slot, self.prefix(slot))
                self._leave(group, row)
        for group in self._groups:
            self._reserve(group, len(group.slots), self._longest(group) + 1, group.layers)
        device = self._groups[0].layers[0][0].device
        shape = [(len(group.slots), self._longest(group) + 1) for group in self._groups]
        self.place(torch.tensor(self.step_lengths, device=device), shape)

    def rounded(self) -> Shape:
        """Slots and columns of each group that a step needs after :meth:`reserve`, rounded up to few values."""
        found = []
        for group in self._groups:
            rows = 1 << (len(group.slots) - 1).bit_length()
            columns = -(-(self._longest(group) + 1) // _BLOCK) * _BLOCK
            found.append((min(rows, group.rows), min(columns, group.columns)))
        return tuple(found)

    def place(self, lengths: Tensor, shape: Sequence[tuple[int, int]]) -> None:
        """Let the next step write behind ``lengths`` and see what ``shape`` says of each group."""
        self._step, start = [], 0
        for group, (count, columns) in zip(self._groups, shape, strict=True):
            rows = torch.arange(count, device=lengths.device)
            self._step.append(_Write(group, slice(start, start + count), rows, lengths[start : start + count], columns))
            start += count

    def write(self, layer: int, keys: Tensor, values: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Put one (slots, heads, size) column behind each; then each group's (slots, heads, columns, size)."""
        if not self._step:
            raise RuntimeError("reserve() comes before write()")
        found = []
        for step in self._step:
            all_keys, all_values = step.group.layers[layer]
            all_keys[step.rows, :, step.lengths] = keys[step.mine]
            all_values[step.rows, :, step.lengths] = values[step.mine]
            count = step.mine.stop - step.mine.start
            found.append((all_keys[:count, :, : step.columns], all_values[:count, :, : step.columns]))
        return found

    def advance(self) -> None:
        """Count the column that a decode step has written to every slot."""
        self.lengths = [length + 1 for length in self.lengths]
        self._step = []

    def blank(self, slot: int) -> None:
        """Zero what a sequence has written that is not finite: even masked it would spoil those that come after it."""
        group, row = self._place(slot)
        for keys, values in group.layers:
            keys[row].zero_()
            values[row].zero_()

    def remove(self, slot: int) -> None:
        """Free a slot; the last one takes its number, and a group without sequences gives its memory back."""
        group, row = self._place(slot)
        self._leave(group, row)
        length, last = self.lengths.pop(), len(self.lengths)
        if slot != last:
            self.lengths[slot] = length
            moved, at = self._place(last)
            moved.slots[at] = slot

    def _of(self, bound: int) -> _Group | None:
        return next((group for group in self._groups if group.bound == bound), None)

    def _place(self, slot: int) -> tuple[_Group, int]:
        """The group and the row in it of a slot."""
        return next((group, group.slots.index(slot)) for group in self._groups if slot in group.slots)

    def _longest(self, group: _Group) -> int:
        return max(self.lengths[slot] for slot in group.slots)

    def _enter(self, slot: int, prefix: Prefix) -> None:
        """A row for a sequence, in the group of its width: all of it or, where memory runs out, nothing."""
        layers, bound = prefix.whole().layers, _bound(prefix.length + 1)
        group = self._of(bound) or _Group(bound)
        self._reserve(group, len(group.slots) + 1, prefix.length + 1, layers)
        group.put(len(group.slots), layers, prefix.length)
        group.slots.append(slot)
        if group not in self._groups:
            self._groups = sorted([*self._groups, group], key=lambda one: one.bound)

    def _leave(self, group: _Group, row: int) -> None:
        """Free a row; the last one of the group takes its place."""
        last = group.slots.pop()
        if row < len(group.slots):
            length = self.lengths[last]
            for keys, values in group.layers:
                keys[row, :, :length] = keys[len(group.slots), :, :length]
                values[row, :, :length] = values[len(group.slots), :, :length]
            group.slots[row] = last
        if not group.slots:
            self._groups.remove(group)
            self.version += 1

    def _allocation(self, group: _Group | None, slots: int, columns: int, others: int) -> tuple[int, int]:
        """Rows and columns of a group's buffers that hold so many, beside so many bytes of other groups."""
        have = group.rows if group is not None else 0
        width = max(group.columns if group is not None else 0, -(-columns // _BLOCK) * _BLOCK)
        # Doubling keeps the copies few while sequences come one by one; where memory is short, none is spare.
        rows = have if slots <= have else min(max(slots, 2 * have), self._most)
        return (rows if others + rows * width * self._column_bytes <= self._budget else slots), width

    def _reserve(self, group: _Group, slots: int, columns: int, like: Layers) -> None:
        if slots <= group.rows and columns <= group.columns:
            return
        self.version += 1
        others = self.nbytes - (group.nbytes if group in self._groups else 0)
        rows, width = self._allocation(group, slots, columns, others)
        longest = self._longest(group) if group.slots else 0
        group.grow(rows, width, like, longest)


class _Group:
    """Buffers of one width.

    Attributes:
        bound: columns up to which its sequences are here.
        slots: whose each row is.
        layers: keys and values per layer, shaped (rows, heads, columns, head size).
    """

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self.slots: list[int] = []
        self.layers: list[tuple[Tensor, Tensor]] = []

    @property
    def rows(self) -> int:
        return self.layers[-1][0].shape[0] if self.layers else 0

    @property
    def columns(self) -> int:
        """Columns allocated for every row."""
        # Of the last layer: where memory ran out while they grew, those before it are larger already.
        return self.layers[-1][0].shape[2] if self.layers else 0

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers)

    def put(self, row: int, layers: Layers, length: int) -> None:
        """Copy the (1, heads, length, size) columns of a sequence into a row."""
        for (keys, values), (new_keys, new_values) in zip(self.layers, layers, strict=True):
            keys[row, :, :length] = new_keys[0]
            values[row, :, :length] = new_values[0]

    def grow(self, rows: int, width: int, like: Layers, longest: int) -> None:
        """Larger buffers, shaped ``like`` those; the rows in use keep their first ``longest`` columns."""
        if not self.layers:
            self.layers = [(_grown(keys, rows, width), _grown(values, rows, width)) for keys, values in like]
            return
        used = len(self.slots)
        # Layer by layer, so that old and new buffers never stand side by side in full.
        for layer, (keys, values) in enumerate(self.layers):
            if keys.shape[0] >= rows and keys.shape[2] >= width:
                continue
            self.layers[layer] = (
                _grown(keys, rows, width, used, longest),
                _grown(values, rows, width, used, longest),
            )


@dataclass(frozen=True, slots=True)
class _Write:
    """Where a group's part of a step goes: which of the step's columns, which rows, behind which lengths."""

    group: _Group
    mine: slice
    rows: Tensor
    lengths: Tensor
    columns: int


def _bound(columns: int) -> int:
    """The widest that a sequence's neighbours may be."""
    bound = _NARROWEST
    while bound < columns:
        bound *= _RATIO
    return bound


def _grown(buffer: Tensor, rows: int, columns: int, used: int = 0, longest: int = 0) -> Tensor:
    """A larger buffer with the used corner of this one."""
    _, heads, _, size = buffer.shape
    # Zeros, not garbage: a masked NaN would still spoil the sum it is weighted into with 0.
    grown = torch.zeros((rows, heads, columns, size), dtype=buffer.dtype, device=buffer.device)
    grown[:used, :, :longest] = buffer[:used, :, :longest]
    return grown
