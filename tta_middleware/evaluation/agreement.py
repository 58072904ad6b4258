"""How far two raters say the same of the same texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, TypeAlias

from tta_middleware.files.jsonl import Record

Pair: TypeAlias = tuple[bool, bool]
"""What the first and the second rater said of one text."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of ``texts`` texts both raters marked ``both``, and one of them alone ``first_only`` and ``second_only``."""

    texts: int
    both: int
    first_only: int
    second_only: int

    @classmethod
    def of(cls, pairs: Iterable[Pair]) -> Agreement:
        found = list(pairs)
        return cls(
            len(found),
            sum(first and second for first, second in found),
            sum(first and not second for first, second in found),
            sum(second and not first for first, second in found),
        )

    @property
    def same(self) -> float | None:
        """The share of texts of which both said the same; None without texts."""
        return None if self.texts == 0 else 1 - (self.first_only + self.second_only) / self.texts

    @property
    def kappa(self) -> float | None:
        """Cohen's kappa (1960), (agreement - chance) / (1 - chance); None where every mark is the same."""
        if self.same is None:
            return None
        first, second = (self.both + self.first_only) / self.texts, (self.both + self.second_only) / self.texts
        chance = first * second + (1 - first) * (1 - second)
        return None if chance == 1 else (self.same - chance) / (1 - chance)


KINDS = ("all", "flagged first answers", "repairs")
"""All judged texts; first answers that the moderator flagged; answers that a method neutralised them with."""


def agreements(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row per pair of judges and kind of text, over different texts: an answer that several methods share, such as
    the first one, counts once. Empty with fewer than two judges."""
    names = dict.fromkeys(name for record in records for name in record.get("judges", {}))
    rows = []
    for first, second in combinations(names, 2):
        for kind in KINDS:
            found = Agreement.of(_pairs(records, kind, first, second))
            rows.append(
                {
                    "judges": [first, second],
                    "of": kind,
                    "texts": found.texts,
                    "same": found.same,
                    "kappa": found.kappa,
                    "both": found.both,
                    "first_only": found.first_only,
                    "second_only": found.second_only,
                }
            )
    return rows


def _pairs(records: Sequence[Record], kind: str, first: str, second: str) -> list[Pair]:
    found: dict[tuple[str, str, bool, bool], Pair] = {}
    for record in records:
        opinions: Mapping[str, Any] = record.get("judges", {})
        if first not in opinions or second not in opinions:
            continue
        for part in _parts(record, kind):
            pair = opinions[first][part]["flagged"], opinions[second][part]["flagged"]
            # A text that was cut is not known whole, but what was said of it is.
            found[str(record["id"]), record[part]["text"] or "", *pair] = pair
    return list(found.values())


def _parts(record: Record, kind: str) -> tuple[str, ...]:
    if kind == "flagged first answers":
        return ("baseline",) if record["baseline"]["flagged"] else ()
    if kind == "repairs":
        return ("final",) if record["neutralised"] is True else ()
    return "baseline", "final"
