"""Texts that ran lately. A longer one, or another after the same beginning, goes on from what they share.

A candidate of a repair is judged when it is chosen and again at its end, all candidates are judged after the same
unmoved prompt, and an answer that a model judges grows from window to window; so most of what has to run has just run.

Texts may belong to somebody, a request say: of what grows only the newest is kept, and all goes when its owner says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from tta_middleware.engines.decoding.kv_slots import Prefix
from tta_middleware.types import IntVector

_KEPT = 128
# A text whose last rows are the only ones that a longer one of its owner does not begin with is not kept beside that
# one: what it has more is a closing question, and running that again costs less than keeping it.
_CLOSING = 64

# Room that a table of marks begins with.
_FIRST_TEXTS, _FIRST_ROWS = 16, 256

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def marks(rows: Tensor) -> IntVector:
    """(T,) numbers: equal for equal rows of (T, d) embeddings, and for no others that anybody could find."""
    bits = rows.detach().contiguous().view(_BITS[rows.element_size()])
    # In wrapping integers, so it is the same wherever it runs; T x d products cost a thousandth of a forward pass.
    found: IntVector = (bits.long() * _factors(rows.shape[1]).to(rows.device)).sum(dim=1).cpu().numpy()
    return found


@cache
def _factors(width: int) -> Tensor:
    # Drawn anew in every process: who knew them could make two texts that pass for one.
    drawn = torch.Generator()
    drawn.seed()
    return torch.randint(-(2**62), 2**62, (width,), generator=drawn) * 2 + 1


def common(one: IntVector, other: IntVector) -> int:
    """How many rows two texts begin with alike, by their marks."""
    length = min(len(one), len(other))
    if not length:
        return 0
    differs = one[:length] != other[:length]
    first = int(differs.argmax())
    return first if differs[first] else length


class MarkTable:
    """Marks of several texts, so that one is compared with all of them at once."""

    def __init__(self, texts: Iterable[IntVector] = ()) -> None:
        self._count = 0
        self._lengths = np.zeros(_FIRST_TEXTS, dtype=np.int64)
        self._table = np.zeros((_FIRST_TEXTS, _FIRST_ROWS), dtype=np.int64)
        for text in texts:
            self.add(text)

    def __len__(self) -> int:
        return self._count

    def add(self, text: IntVector) -> None:
        """Have one more, behind the others."""
        at, (texts, rows) = self._count, self._table.shape
        if at == texts or len(text) > rows:
            wider = np.zeros((2 * at if at == texts else texts, max(rows, 2 * len(text))), dtype=np.int64)
            wider[:at, :rows] = self._table[:at]
            self._table = wider
            self._lengths = np.concatenate([self._lengths[:at], np.zeros(len(wider) - at, dtype=np.int64)])
        self._table[at, : len(text)] = text
        self._lengths[at] = len(text)
        self._count += 1

    def keep(self, wanted: Sequence[bool]) -> None:
        """Keep these of them, in their order."""
        left = np.flatnonzero(wanted)
        self._table[: len(left)] = self._table[left]
        self._lengths[: len(left)] = self._lengths[left]
        self._count = len(left)

    def common(self, text: IntVector) -> IntVector:
        """(n,) how many rows ``text`` begins with alike with each."""
        columns = min(len(text), self._table.shape[1])
        lengths: IntVector = np.minimum(self._lengths[: self._count], columns)
        if not self._count or not columns:
            return lengths
        differs = self._table[: self._count, :columns] != text[:columns]
        first = differs.argmax(axis=1)
        first[~differs[np.arange(self._count), first]] = columns
        # What stands behind a text's end is nothing that it has.
        alike: IntVector = np.minimum(first, lengths)
        return alike


@dataclass(frozen=True, slots=True, eq=False)
class _Text:
    marks: IntVector
    prefix: Prefix
    first: int
    nats: list[float]
    owner: int | None
    nbytes: int


class Scored:
    """The latest texts, within a number and ``most_bytes``.

    Where they do not fit, the oldest of whoever holds most goes, so that one long answer pushes out none of the others.

    Attributes:
        nbytes: what they take.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        # From the oldest to the newest, with the table of their marks.
        self._texts: list[_Text] = []
        self._table = MarkTable()
        # The latest rows that were asked for, and what each text shares with them: they are asked for several times.
        self._looked_up: tuple[IntVector, IntVector] | None = None
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._texts)

    def keep(
        self, of_rows: IntVector, prefix: Prefix, first: int, nats: Sequence[float], owner: int | None = None
    ) -> None:
        """Remember T rows that have run.

        Args:
            of_rows: their :func:`marks`.
            first: the column from which on it is known how unlikely the token after it was: ``nats``.
            owner: whose text it is; see :meth:`forget`.
        """
        # In one piece: of what it went on from it would hold whole texts of others.
        prefix = prefix.whole()
        new = _Text(of_rows, prefix, first, list(nats), owner, prefix.nbytes + of_rows.nbytes)
        shared = self._shared(of_rows).tolist()
        self._leave([not _replaces(new, text, rows) for text, rows in zip(self._texts, shared, strict=True)])
        self._texts.append(new)
        self._table.add(of_rows)
        self._looked_up = None
        self.nbytes += new.nbytes
        while len(self._texts) > _KEPT or (self._texts and self.nbytes > self._most_bytes):
            self._drop_one()

    def begin(self, of_rows: IntVector, first: int, more_than: int = 1) -> tuple[Prefix, list[float]] | None:
        """The longest beginning of rows that has run, with the nats of the tokens after its columns from ``first``.

        At least one row is left to run. None if no more than ``more_than`` rows are shared.
        """
        best, shared = self._best(of_rows)
        if best is None or shared <= max(1, more_than):
            return None
        if shared <= first or best.first > first:
            return best.prefix.cut(min(shared, first, len(of_rows) - 1)), []
        # What follows the last column in common may differ, so that column runs again.
        return best.prefix.cut(shared - 1), best.nats[first - best.first : shared - 1 - best.first]

    def beginning(self, of_rows: IntVector, most: int) -> Prefix | None:
        """What has run of the longest beginning of rows, ``most`` of them at the most."""
        best, shared = self._best(of_rows)
        length = min(most, shared)
        return best.prefix.cut(length) if best is not None and length else None

    def shared_with(self, of_rows: IntVector) -> int:
        """How many rows the best of the texts begins with alike."""
        return self._best(of_rows)[1]

    def forget(self, owner: int) -> None:
        """Let go of all texts of an owner."""
        self._leave([text.owner != owner for text in self._texts])

    def clear(self) -> None:
        self._leave([False] * len(self._texts))

    def _leave(self, wanted: Sequence[bool]) -> None:
        """Leave these texts alone, and none of the others."""
        if all(wanted):
            return
        self._texts = [text for text, stays in zip(self._texts, wanted, strict=True) if stays]
        self.nbytes = sum(text.nbytes for text in self._texts)
        self._table.keep(wanted)
        self._looked_up = None

    def _shared(self, of_rows: IntVector) -> IntVector:
        """(n,) how many rows each of the texts begins with alike."""
        if self._looked_up is None or self._looked_up[0] is not of_rows:
            self._looked_up = of_rows, self._table.common(of_rows)
        return self._looked_up[1]

    def _best(self, of_rows: IntVector) -> tuple[_Text | None, int]:
        """The newest of those that begin with most of these rows, and how many."""
        if not self._texts:
            return None, 0
        shared = self._shared(of_rows)
        at = len(shared) - 1 - int(shared[::-1].argmax())
        return self._texts[at], int(shared[at])

    def _drop_one(self) -> None:
        held: Counter[int | None] = Counter()
        for text in self._texts:
            held[text.owner] += text.nbytes
        [(largest, _)] = held.most_common(1)
        oldest = next(text for text in self._texts if text.owner == largest)
        self._leave([text is not oldest for text in self._texts])


def _replaces(new: _Text, old: _Text, shared: int) -> bool:
    """Whether whatever could go on from ``old`` can go on from ``new``, or nearly so: ``shared`` rows are alike."""
    if old.nats and new.first > old.first:
        return False
    grown = new.owner is not None and new.owner == old.owner and len(old.marks) - shared <= _CLOSING
    return shared == len(old.marks) or (grown and len(new.marks) >= shared)
