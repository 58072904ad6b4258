"""What the plots show, as plain numbers. Only runs whose undefended answer was flagged count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from tta_middleware.evaluation.statistics import mean, percentile
from tta_middleware.files.jsonl import Record

MOST_CATEGORIES = 8


def flagged_by_method(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The runs that count, by method in the order of their first record; methods without any are left out."""
    found: dict[str, list[Record]] = {}
    for record in records:
        if record["baseline"]["flagged"] and record.get("benign") is not True:
            found.setdefault(record["method"], []).append(record)
    return found


def survival(records: Sequence[Record]) -> tuple[list[float], list[float]]:
    """Generated tokens, and the share of runs that were neutralised with at most so many."""
    spent = sorted(record["generated_tokens"] for record in records if record["neutralised"] is True)
    tokens, shares = [0.0], [0.0]
    for count, tokens_spent in enumerate(spent, start=1):
        tokens.append(float(tokens_spent))
        shares.append(count / len(records))
    return tokens, shares


def trajectory(records: Sequence[Record], most: int = 24) -> list[float]:
    """The median over runs of the lowest score so far, after the first answer and after each wave.

    A run that has ended keeps its last value. At most ``most`` waves, and no more than the longest run has.
    """
    runs = [_lowest(record) for record in records]
    length = min(most + 1, max(map(len, runs)))
    columns = [[run[min(wave, len(run) - 1)] for run in runs] for wave in range(length)]
    return [percentile(column, 0.5) or 0.0 for column in columns]


def _lowest(record: Record) -> list[float]:
    lowest = [float(record["baseline"]["score"])]
    for step in record["steps"]:
        lowest.append(min([lowest[-1], *step["scores"]]))
    return lowest


def front(records: Sequence[Record], closeness: str) -> tuple[float, float] | None:
    """Mean closeness and share neutralised; ``closeness`` is ``relevance`` or ``relative_move``."""
    values = [r["final"].get("relevance") if closeness == "relevance" else r[closeness] for r in records]
    measured = mean([value for value in values if value is not None])
    if measured is None:
        return None
    return measured, sum(record["neutralised"] is True for record in records) / len(records)


def by_category(methods: Mapping[str, Sequence[Record]]) -> dict[str, dict[str, float]]:
    """Per category, named with its number of prompts, the share neutralised by method; the largest first.

    A category is the prompt's, or the one that the moderator flagged where the prompt has none.
    """
    prompts = {(str(record["id"]), _category(record)) for records in methods.values() for record in records}
    sizes = Counter(category for _, category in sorted(prompts))
    return {f"{name} ({size})": _shares(methods, name) for name, size in sizes.most_common(MOST_CATEGORIES)}


def _shares(methods: Mapping[str, Sequence[Record]], category: str) -> dict[str, float]:
    shares = {}
    for name, records in methods.items():
        mine = [record["neutralised"] is True for record in records if _category(record) == category]
        if mine:
            shares[name] = sum(mine) / len(mine)
    return shares


def _category(record: Record) -> str:
    return record.get("category") or record["baseline"].get("category") or "other"
