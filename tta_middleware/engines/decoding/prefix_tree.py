"""Beginnings of sequences that have run, as a tree: what several share is kept once, whatever follows it hangs below.

A turn of a conversation begins with all turns before it, so it goes on from what the last one left here. Rows are
compared by what they are (:func:`~tta_middleware.engines.decoding.scored.marks`), never by tokens or by who asked: a
row that was moved is another row, and all behind it stands elsewhere in the tree. Every beginning starts at a
sequence's first place.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tta_middleware.engines.decoding.capacity import is_out_of_memory
from tta_middleware.engines.decoding.kv_slots import Layers, Prefix
from tta_middleware.engines.decoding.scored import common
from tta_middleware.types import IntVector

# A shorter stretch is worth neither a forward pass nor a piece of its own.
WORTH_SHARING = 16
_MOST_PIECES = 512


class _Piece:
    """Some rows of a sequence, behind those of its parents.

    Attributes:
        marks: of its own rows; the root has none.
        layers: their keys and values, in memory that is this piece's alone.
        parent: the root's is itself.
        used: when it was last asked for, or kept.
    """

    __slots__ = ("children", "layers", "marks", "nbytes", "parent", "used")

    def __init__(self, marks: IntVector, layers: Layers, parent: _Piece | None, used: int = 0) -> None:
        self.marks, self.layers, self.used = marks, layers, used
        self.parent: _Piece = self if parent is None else parent
        self.children: list[_Piece] = []
        self.nbytes = marks.nbytes + _bytes(layers)

    def below(self) -> Iterator[_Piece]:
        """Every piece that hangs below it."""
        waiting = [*self.children]
        while waiting:
            piece = waiting.pop()
            yield piece
            waiting += piece.children

    def bytes_of_its_own(self) -> int:
        """What no other sequence's end shares with this end: up to where the tree forks."""
        piece, total = self, self.nbytes
        while piece.parent is not piece and len(piece.parent.children) == 1:
            piece = piece.parent
            total += piece.nbytes
        return total


class PrefixTree:
    """Beginnings within ``most_bytes``; used by the decode thread alone.

    Where they do not fit, ends of sequences go first, and of these the one whose bytes, times how long nobody has asked
    for it, are most. So nobody loses what he holds to somebody who holds more and has been idle for longer.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.nbytes = 0
        self._clock = 0
        self._root = _Piece(np.empty(0, dtype=np.int64), [], None)

    def __len__(self) -> int:
        """Pieces that are kept."""
        return sum(1 for _ in self._root.below())

    def find(self, marks: IntVector, most: int) -> Prefix | None:
        """What is kept of the longest beginning of these rows, ``most`` of them at the most; None of a short one."""
        found: Prefix | None = None
        self._clock += 1
        for piece, shared in self._path(marks[:most]):
            piece.used = self._clock
            found = Prefix(_part(piece.layers, 0, shared), shared + (found.length if found else 0), found)
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

    def _path(self, marks: IntVector) -> list[tuple[_Piece, int]]:
        """The pieces that these rows run along, and how many rows of each; of the last one perhaps not all."""
        path: list[tuple[_Piece, int]] = []
        piece, left = self._root, marks
        while piece.children:
            shared, best = max(
                ((common(child.marks, left), child) for child in piece.children), key=lambda pair: pair[0]
            )
            # Up to a few rows several beginnings may be alike and stand side by side nevertheless.
            if shared < min(WORTH_SHARING, len(best.marks)):
                break
            path.append((best, shared))
            if shared < len(best.marks):
                break
            piece, left = best, left[shared:]
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
        layers = _copied(prefix.whole().layers, done, len(marks))
        parent = self._split(*path[-1]) if path else self._root
        piece = _Piece(marks[done:].copy(), layers, parent, self._clock)
        parent.children.append(piece)
        self.nbytes += piece.nbytes
        self.shrink(self.most_bytes)
        while len(self) > _MOST_PIECES:
            self._drop_one()

    def _fits(self, rows: int, prefix: Prefix) -> bool:
        return rows * prefix.nbytes <= self.most_bytes * prefix.length

    def _split(self, piece: _Piece, at: int) -> _Piece:
        """A piece of the first ``at`` rows of ``piece``, with the rest of them below it."""
        if at == len(piece.marks):
            return piece
        # All memory is taken before anything is changed; in pieces of one tensor neither would give memory back.
        head = _Piece(piece.marks[:at].copy(), _copied(piece.layers, 0, at), piece.parent, piece.used)
        rest = _Piece(piece.marks[at:].copy(), _copied(piece.layers, at, len(piece.marks)), head, piece.used)
        rest.children, head.children = piece.children, [rest]
        for child in rest.children:
            child.parent = rest
        head.parent.children[head.parent.children.index(piece)] = head
        self.nbytes += head.nbytes + rest.nbytes - piece.nbytes
        return head

    def _drop_one(self) -> None:
        ends = [piece for piece in self._root.below() if not piece.children]
        piece = max(ends, key=lambda end: end.bytes_of_its_own() * (self._clock - end.used + 1))
        piece.parent.children.remove(piece)
        self.nbytes -= piece.nbytes


def _bytes(layers: Layers) -> int:
    return sum(keys.nbytes + values.nbytes for keys, values in layers)


def _part(layers: Layers, start: int, end: int) -> Layers:
    return [(keys[:, :, start:end], values[:, :, start:end]) for keys, values in layers]


def _copied(layers: Layers, start: int, end: int) -> Layers:
    return [(keys.clone(), values.clone()) for keys, values in _part(layers, start, end)]
