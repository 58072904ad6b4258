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

from tta_middleware.engines.decoding.columns import Columns, Kind, Layout, Pair

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
        columns: those of them that stand behind ``before``.
        before: the columns before them, where they are kept apart; None if there are none.
    """

    columns: Columns
    length: int
    before: Prefix | None = None

    def cut(self, length: int) -> Prefix:
        """Its first columns alone; nothing is copied."""
        kept = self
        while kept.before is not None and length <= kept.before.length:
            kept = kept.before
        own = length - (kept.before.length if kept.before else 0)
        return Prefix(kept.columns.part(0, own), length, kept.before)

    def pieces(self) -> list[Columns]:
        """Its columns in their order, piece by piece."""
        return [piece.columns for piece in self._chain()]

    def whole(self) -> Prefix:
        """The same in one piece; copied unless it is one."""
        return self if self.before is None else Prefix(Columns.joined(self.pieces()), self.length)

    def copied(self, start: int, end: int) -> Columns:
        """Its columns from ``start`` to before ``end``, in memory of their own."""
        parts: list[Columns] = []
        at = 0
        for piece in self.pieces():
            if at < end and at + piece.count > start:
                parts.append(piece.part(max(0, start - at), min(piece.count, end - at)))
            at += piece.count
        return parts[0].copied() if len(parts) == 1 else Columns.joined(parts)

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces())

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
        length = self.lengths[slot]
        return Prefix(group.columns_of(row, length), length)

    def reserve(self) -> None:
        """Make room for one more column in every slot and note where it goes; may change :attr:`order`."""
        for slot, length in enumerate(self.lengths):
            group, row = self._place(slot)
            if length + 1 > group.bound:
                self._enter(slot, self.prefix(slot))
                self._leave(group, row)
        for group in self._groups:
            self._reserve(group, len(group.slots), self._longest(group) + 1)
        device = self._groups[0].blocks[0].device
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
            all_keys, all_values = step.group.pair(layer)
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
        for block in group.blocks:
            block[:, row].zero_()

    def remove(self, slot: int) -> None:
        """Free a slot; the last one takes its number, and a group without sequences gives its memory back."""
        group, row = self._place(slot)
        self._leave(group, row)
        length, last = self.lengths.pop(), len(self.lengths)
        if slot != last:
            self.lengths[slot] = length
            moved, at = self._place(last)
            moved.slots[at] = slot

    def clear(self) -> None:
        """Let go of all sequences and buffers; nothing is copied, so it works where no tensor can be touched."""
        self.lengths, self._groups, self._step = [], [], []
        self.version += 1

    def _of(self, bound: int) -> _Group | None:
        return next((group for group in self._groups if group.bound == bound), None)

    def _place(self, slot: int) -> tuple[_Group, int]:
        """The group and the row in it of a slot."""
        return next((group, group.slots.index(slot)) for group in self._groups if slot in group.slots)

    def _longest(self, group: _Group) -> int:
        return max(self.lengths[slot] for slot in group.slots)

    def _enter(self, slot: int, prefix: Prefix) -> None:
        """A row for a sequence, in the group of its width: all of it or, where memory runs out, nothing."""
        pieces, bound = prefix.pieces(), _bound(prefix.length + 1)
        group = self._of(bound) or _Group(bound, pieces[0].layout)
        self._reserve(group, len(group.slots) + 1, prefix.length + 1)
        group.put(len(group.slots), pieces)
        group.slots.append(slot)
        if group not in self._groups:
            self._groups = sorted([*self._groups, group], key=lambda one: one.bound)

    def _leave(self, group: _Group, row: int) -> None:
        """Free a row; the last one of the group takes its place."""
        last = group.slots.pop()
        if row < len(group.slots):
            group.put(row, [group.columns_of(len(group.slots), self.lengths[last])])
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

    def _reserve(self, group: _Group, slots: int, columns: int) -> None:
        if slots <= group.rows and columns <= group.columns:
            return
        self.version += 1
        others = self.nbytes - (group.nbytes if group in self._groups else 0)
        rows, width = self._allocation(group, slots, columns, others)
        longest = self._longest(group) if group.slots else 0
        group.grow(rows, width, longest)


class _Group:
    """Buffers of one width.

    Attributes:
        bound: columns up to which its sequences are here.
        slots: whose each row is.
        blocks: keys and values by the kinds of their layout, shaped (tensors, rows, heads, columns, head size).
    """

    def __init__(self, bound: int, layout: Layout) -> None:
        self.bound = bound
        self.slots: list[int] = []
        self.blocks: list[Tensor] = []
        self._layout = layout

    @property
    def rows(self) -> int:
        return self.blocks[-1].shape[1] if self.blocks else 0

    @property
    def columns(self) -> int:
        """Columns allocated for every row."""
        # Of the last block: where memory ran out while they grew, those before it are larger already.
        return self.blocks[-1].shape[3] if self.blocks else 0

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self.blocks)

    def pair(self, layer: int) -> Pair:
        """A layer's keys and values, each (rows, heads, columns, head size)."""
        return self._layout.pair(self.blocks, layer)

    def columns_of(self, row: int, length: int) -> Columns:
        """The first columns of a row; nothing is copied."""
        return Columns(self._layout, [block[:, row, :, :length] for block in self.blocks])

    def put(self, row: int, pieces: Sequence[Columns]) -> None:
        """Copy columns into a row, piece behind piece."""
        start = 0
        for piece in pieces:
            end = start + piece.count
            for block, new in zip(self.blocks, piece.blocks, strict=True):
                block[:, row, :, start:end] = new
            start = end

    def grow(self, rows: int, width: int, longest: int) -> None:
        """Larger buffers; the rows in use keep their first ``longest`` columns."""
        if not self.blocks:
            # Zeros, not garbage: a masked NaN would still spoil the sum it is weighted into with 0.
            self.blocks = [_zeros(kind, rows, width) for kind in self._layout.kinds]
            return
        used = len(self.slots)
        # Block by block, so that old and new buffers never stand side by side in full.
        for at, (kind, block) in enumerate(zip(self._layout.kinds, self.blocks, strict=True)):
            if block.shape[1] >= rows and block.shape[3] >= width:
                continue
            grown = _zeros(kind, rows, width)
            grown[:, :used, :, :longest] = block[:, :used, :, :longest]
            self.blocks[at] = grown


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


def _zeros(kind: Kind, rows: int, columns: int) -> Tensor:
    shape = (kind.count, rows, kind.heads, columns, kind.size)
    return torch.zeros(shape, dtype=kind.dtype, device=kind.device)
