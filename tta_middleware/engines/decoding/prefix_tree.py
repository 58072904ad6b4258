"""Beginnings of sequences that have run, as a tree: what several share is kept once, whatever follows it hangs below.

A turn of a conversation begins with all turns before it, so it goes on from what the last one left here. Rows are
compared by what they are (:func:`~tta_middleware.engines.decoding.scored.marks`), never by tokens or by who asked: a
row that was moved is another row, and all behind it stands elsewhere in the tree. Every beginning starts at a
sequence's first place.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import TypeVar

import numpy as np

from tta_middleware.engines.decoding.capacity import is_out_of_memory
from tta_middleware.engines.decoding.columns import Columns, Layout
from tta_middleware.engines.decoding.kv_slots import Prefix
from tta_middleware.engines.decoding.scored import common
from tta_middleware.types import IntVector

Found = TypeVar("Found")

# A shorter stretch is worth neither a forward pass nor a piece of its own.
WORTH_SHARING = 16
_MOST_PIECES = 512
_MOST_GONE = 4096


class _Piece:
    """Some rows of a sequence, behind those of its parents.

    Attributes:
        marks: of its own rows; the root has none.
        columns: their keys and values, in memory that is this piece's alone.
        parent: the root's is itself.
        children: by their :attr:`key`. Two that begin with as many rows alike are one piece, so no key comes twice.
        used: when it was last asked for, or kept.
    """

    __slots__ = ("children", "columns", "marks", "nbytes", "parent", "used")

    def __init__(self, marks: IntVector, columns: Columns, parent: _Piece | None, used: int = 0) -> None:
        self.marks, self.columns, self.used = marks, columns, used
        self.parent: _Piece = self if parent is None else parent
        self.children: dict[bytes, _Piece] = {}
        self.nbytes = marks.nbytes + columns.nbytes

    @property
    def key(self) -> bytes:
        """Its first rows: what a sequence must go on with to go on here."""
        return self.marks[:WORTH_SHARING].tobytes()

    def child(self, left: IntVector) -> _Piece | None:
        """The one that these rows go on in; looked up, since hundreds of sequences may begin with one system prompt."""
        return _going_on(self.children, left)

    def hang(self, piece: _Piece) -> None:
        """Let ``piece`` follow this one, perhaps in the place of one that begins alike."""
        self.children[piece.key] = piece
        piece.parent = self

    def below(self) -> Iterator[_Piece]:
        """Every piece that hangs below it."""
        waiting = [*self.children.values()]
        while waiting:
            piece = waiting.pop()
            yield piece
            waiting += piece.children.values()

    def bytes_of_its_own(self) -> int:
        """What no other sequence's end shares with this end: up to where the tree forks."""
        piece, total = self, self.nbytes
        while piece.parent is not piece and len(piece.parent.children) == 1:
            piece = piece.parent
            total += piece.nbytes
        return total


class PrefixTree:
    """Beginnings within ``most_bytes``; used by the decode thread alone.

    It takes ``first_bytes`` of them until rows are asked for that it has let go of lately: prompts that nobody goes on
    from fill no more than that.

    Where they do not fit, ends of sequences go first, and of these the one whose bytes, times how long nobody has asked
    for it, are most. So nobody loses what he holds to somebody who holds more and has been idle for longer.
    """

    def __init__(self, most_bytes: int, first_bytes: int | None = None) -> None:
        self.most_bytes = most_bytes
        self.nbytes = 0
        self._room = most_bytes if first_bytes is None else min(first_bytes, most_bytes)
        # Keys of the latest pieces that are gone, while there might be more room.
        self._gone: OrderedDict[bytes, bool] = OrderedDict()
        self._clock = 0
        self._root = _Piece(np.empty(0, dtype=np.int64), Columns(Layout([]), []), None)

    def __len__(self) -> int:
        """Pieces that are kept."""
        return sum(1 for _ in self._root.below())

    def find(self, marks: IntVector, most: int) -> Prefix | None:
        """What is kept of the longest beginning of these rows, ``most`` of them at the most; None of a short one."""
        found: Prefix | None = None
        self._clock += 1
        for piece, shared in self._path(marks[:most]):
            piece.used = self._clock
            found = Prefix(piece.columns.part(0, shared), shared + (found.length if found else 0), found)
        self._miss(marks[found.length if found else 0 : most])
        return found

    def shared_with(self, marks: IntVector) -> int:
        """How many of the first of these rows are here."""
        return sum(shared for _, shared in self._path(marks))

    def keep(self, marks: IntVector, prefix: Prefix) -> None:
        """Copy what is new of rows that have run; nothing happens where there is no memory for it."""
        try:
            self._insert(marks, prefix)
        except Exception as exc:
            if not is_out_of_memory(exc):
                raise
            # Whoever runs needs the memory more.
            self.clear()

    def shrink(self, most_bytes: int) -> None:
        """Let go of what is above ``most_bytes``."""
        while self._root.children and self.nbytes > most_bytes:
            self._drop_one()

    def clear(self) -> None:
        """Let go of everything."""
        self._root.children.clear()
        self.nbytes = 0

    def _miss(self, left: IntVector) -> None:
        """Take all the room that there is where these rows were here lately."""
        if self._room < self.most_bytes and _going_on(self._gone, left):
            self._room = self.most_bytes
            self._gone.clear()

    def _path(self, marks: IntVector) -> list[tuple[_Piece, int]]:
        """The pieces that these rows run along, and how many rows of each; of the last one perhaps not all."""
        path: list[tuple[_Piece, int]] = []
        piece, left = self._root, marks
        # Up to a few rows several beginnings may be alike and stand side by side nevertheless.
        while (child := piece.child(left)) is not None:
            shared = common(child.marks, left)
            path.append((child, shared))
            if shared < len(child.marks):
                break
            piece, left = child, left[shared:]
        return path

    def _insert(self, marks: IntVector, prefix: Prefix) -> None:
        path = self._path(marks)
        done = sum(shared for _, shared in path)
        self._clock += 1
        for piece, _ in path:
            piece.used = self._clock
        # What does not fit by itself would push out all others first.
        if len(marks) - done < WORTH_SHARING or not self._fits(len(marks) - done, prefix):
            return
        columns = prefix.copied(done, len(marks))
        parent = self._split(*path[-1]) if path else self._root
        piece = _Piece(marks[done:].copy(), columns, parent, self._clock)
        parent.hang(piece)
        self.nbytes += piece.nbytes
        self.shrink(self._room)
        while len(self) > _MOST_PIECES:
            self._drop_one()

    def _fits(self, rows: int, prefix: Prefix) -> bool:
        return rows * prefix.nbytes <= self.most_bytes * prefix.length

    def _split(self, piece: _Piece, at: int) -> _Piece:
        """A piece of the first ``at`` rows of ``piece``, with the rest of them below it."""
        if at == len(piece.marks):
            return piece
        # All memory is taken before anything is changed; in pieces of one tensor neither would give memory back.
        head = _Piece(piece.marks[:at].copy(), piece.columns.part(0, at).copied(), piece.parent, piece.used)
        rest = _Piece(piece.marks[at:].copy(), piece.columns.part(at, len(piece.marks)).copied(), head, piece.used)
        for child in piece.children.values():
            rest.hang(child)
        head.hang(rest)
        piece.parent.hang(head)
        self.nbytes += head.nbytes + rest.nbytes - piece.nbytes
        return head

    def _drop_one(self) -> None:
        ends = [piece for piece in self._root.below() if not piece.children]
        piece = max(ends, key=lambda end: end.bytes_of_its_own() * (self._clock - end.used + 1))
        del piece.parent.children[piece.key]
        self.nbytes -= piece.nbytes
        if self._room < self.most_bytes:
            self._gone[piece.key] = True
            if len(self._gone) > _MOST_GONE:
                self._gone.popitem(last=False)


def _going_on(known: Mapping[bytes, Found], left: IntVector) -> Found | None:
    """What is known under the first of these rows, as many as a piece's key has."""
    key, row = left[:WORTH_SHARING].tobytes(), left.itemsize
    starts = (key[: row * size] for size in range(len(key) // row, 0, -1))
    return next((known[start] for start in starts if start in known), None)
