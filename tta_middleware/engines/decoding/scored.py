"""Texts that ran lately. A longer one, or another after the same beginning, goes on from what they share.

A candidate of a repair is judged when it is chosen and again at its end, all candidates are judged after the same
unmoved prompt, and an answer that a model judges grows from window to window; so most of what has to run has just run.

Texts may belong to somebody, a request say: of what grows only the newest is kept, and all goes when its owner says so.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from tta_middleware.engines.decoding.kv_slots import Prefix
from tta_middleware.types import IntVector

_KEPT = 128
# A text whose last rows are the only ones that a longer one of its owner does not begin with is not kept beside that
# one: what it has more is a closing question, and running that again costs less than keeping it.
_CLOSING = 64

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
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._texts: deque[_Text] = deque()

    def __len__(self) -> int:
        return len(self._texts)

    @property
    def nbytes(self) -> int:
        return sum(text.nbytes for text in self._texts)

    def keep(
        self, of_rows: IntVector, prefix: Prefix, first: int, nats: Sequence[float], owner: int | None = None
    ) -> None:
        """Remember T rows that have run.

        Args:
            of_rows: their :func:`marks`.
            first: the column from which on it is known how unlikely the token after it was: ``nats``.
            owner: whose text it is; see :meth:`forget`.
        """
        new = _Text(of_rows, prefix, first, list(nats), owner, prefix.nbytes + of_rows.nbytes)
        self._texts = deque(text for text in self._texts if not _replaces(new, text))
        self._texts.appendleft(new)
        while len(self._texts) > _KEPT or (self._texts and self.nbytes > self._most_bytes):
            self._drop_one()

    def begin(self, of_rows: IntVector, first: int, more_than: int = 1) -> tuple[Prefix, list[float]] | None:
        """The longest beginning of rows that has run, with the nats of the tokens after its columns from ``first``.

        At least one row is left to run. None if no more than ``more_than`` rows are shared.
        """
        best = max(self._texts, key=lambda text: common(text.marks, of_rows), default=None)
        if best is None or (shared := common(best.marks, of_rows)) <= max(1, more_than):
            return None
        if shared <= first or best.first > first:
            return best.prefix.cut(min(shared, first, len(of_rows) - 1)), []
        # What follows the last column in common may differ, so that column runs again.
        return best.prefix.cut(shared - 1), best.nats[first - best.first : shared - 1 - best.first]

    def beginning(self, of_rows: IntVector, most: int) -> Prefix | None:
        """What has run of the longest beginning of rows, ``most`` of them at the most."""
        best = max(self._texts, key=lambda text: common(text.marks, of_rows), default=None)
        length = min(most, common(best.marks, of_rows)) if best is not None else 0
        return best.prefix.cut(length) if best is not None and length else None

    def shared_with(self, of_rows: IntVector) -> int:
        """How many rows the best of the texts begins with alike."""
        return max((common(text.marks, of_rows) for text in self._texts), default=0)

    def forget(self, owner: int) -> None:
        """Let go of all texts of an owner."""
        self._texts = deque(text for text in self._texts if text.owner != owner)

    def clear(self) -> None:
        self._texts.clear()

    def _drop_one(self) -> None:
        held: Counter[int | None] = Counter()
        for text in self._texts:
            held[text.owner] += text.nbytes
        [(largest, _)] = held.most_common(1)
        oldest = next(text for text in reversed(self._texts) if text.owner == largest)
        self._texts.remove(oldest)


def _replaces(new: _Text, old: _Text) -> bool:
    """Whether whatever could go on from ``old`` can go on from ``new`` as well, or nearly so."""
    shared = common(new.marks, old.marks)
    if old.nats and new.first > old.first:
        return False
    grown = new.owner is not None and new.owner == old.owner and len(old.marks) - shared <= _CLOSING
    return shared == len(old.marks) or (grown and len(new.marks) >= shared)
