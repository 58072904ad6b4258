"""Texts that were scored lately. A longer one, or another after the same prompt, goes on from what they share.

A candidate of a repair is judged when it is chosen and again at its end, and all candidates are judged after the same
unmoved prompt; so most of what a score has to run has just been run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tta_middleware.engines.decoding.kv_slots import Prefix

_KEPT = 32


@dataclass(frozen=True, slots=True, eq=False)
class _Text:
    rows: Tensor
    prefix: Prefix
    first: int
    nats: list[float]

    @property
    def nbytes(self) -> int:
        return self.prefix.nbytes + self.rows.nbytes


class Scored:
    """The latest texts, within a number and ``most_bytes``."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._texts: deque[_Text] = deque()

    @property
    def nbytes(self) -> int:
        return sum(text.nbytes for text in self._texts)

    def keep(self, rows: Tensor, prefix: Prefix, first: int, nats: Sequence[float]) -> None:
        """Remember (T, d) rows that have run, and how unlikely the token after each from column ``first`` was."""
        self._texts.appendleft(_Text(rows, prefix, first, list(nats)))
        while len(self._texts) > _KEPT or (self._texts and self.nbytes > self._most_bytes):
            self._texts.pop()

    def begin(self, rows: Tensor, first: int, more_than: int = 1) -> tuple[Prefix, list[float]] | None:
        """The longest beginning of ``rows`` that has run, with the nats of the tokens after its columns from ``first``.

        At least one row is left to run. None if no more than ``more_than`` rows are shared.
        """
        best = max(self._texts, key=lambda text: _common(text.rows, rows), default=None)
        if best is None or (common := _common(best.rows, rows)) <= max(1, more_than):
            return None
        if common <= first or best.first > first:
            return best.prefix.cut(min(common, first, len(rows) - 1)), []
        # What follows the last column in common may differ, so that column runs again.
        return best.prefix.cut(common - 1), best.nats[first - best.first : common - 1 - best.first]

    def clear(self) -> None:
        self._texts.clear()


def _common(one: Tensor, other: Tensor) -> int:
    """How many rows both begin with."""
    length = min(len(one), len(other))
    differs = (one[:length] != other[:length]).any(dim=1)
    found = differs.nonzero()
    return int(found[0]) if len(found) else length
