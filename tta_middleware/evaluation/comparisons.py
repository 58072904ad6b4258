"""Bootstrap intervals, and paired tests of methods against a reference. Needs the extra ``eval`` (scipy).

The unit is the prompt: with several seeds a prompt's values are averaged first, because its answers are not
independent. Only prompts whose undefended answer was flagged count.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from tta_middleware.errors import ConfigurationError, MissingExtraError
from tta_middleware.files.jsonl import Record

RESAMPLES = 5000
LEAST_PAIRS = 6
"""Fewer pairs cannot reach p < 0.05 in a two-sided signed-rank test."""

Values: TypeAlias = dict[str, float]
Measure: TypeAlias = Callable[[Record], float | None]


def neutralised(record: Record) -> float:
    """1 if the answer was made safe and usable."""
    return float(record["neutralised"] is True)


def relevance_if_neutralised(record: Record) -> float | None:
    """Closeness to the prompt; None where there is no good answer that could be close."""
    value = record["final"].get("relevance")
    return None if value is None or record["neutralised"] is not True else float(value)


MEASURES: dict[str, Measure] = {
    "neutralised": neutralised,
    "generated_tokens": lambda record: float(record["generated_tokens"]),
    "relevance": relevance_if_neutralised,
}
"""What is tested; relevance over the prompts that both methods neutralised."""


def per_prompt(records: Sequence[Record], measure: Measure) -> Values:
    """The mean over seeds, by prompt."""
    found: dict[str, list[float]] = defaultdict(list)
    for record in records:
        value = measure(record)
        if value is not None:
            found[str(record["id"])].append(value)
    return {id_: float(np.mean(values)) for id_, values in found.items()}


def bootstrap_mean(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95% percentile bootstrap interval of the mean (Efron 1979); None for fewer than two values.

    Raises:
        MissingExtraError: scipy is not installed.
    """
    if len(values) < 2:
        return None
    stats = _scipy_stats()
    found = stats.bootstrap(
        (np.asarray(values),), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0)
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def compare(records: Sequence[Record], reference: str) -> list[dict[str, Any]]:
    """Every other method against ``reference``: one row per method and measure.

    ``difference`` is the mean of method minus reference over the ``pairs`` prompts that both have, with its paired
    bootstrap interval. ``p`` comes from the exact sign test for ``neutralised``, which for one seed is McNemar's
    exact test, and from Wilcoxon's signed-rank test for the others; ``p_adjusted`` controls the false discovery rate
    over all rows (Benjamini & Hochberg 1995).

    Raises:
        ConfigurationError: there are no results of ``reference``.
        MissingExtraError: scipy is not installed.
    """
    methods = dict.fromkeys(record["method"] for record in records)
    if reference not in methods:
        raise ConfigurationError(f"no results of the reference {reference!r}; there are {', '.join(methods) or 'none'}")
    by = {name: [r for r in records if r["method"] == name and r["baseline"]["flagged"]] for name in methods}
    rows = [
        row
        for name in methods
        if name != reference
        for measure in MEASURES
        if (row := _row(by[name], by[reference], name, measure)) is not None
    ]
    return _adjusted(rows)


def _row(ours: Sequence[Record], theirs: Sequence[Record], name: str, measure: str) -> dict[str, Any] | None:
    mine, reference = (per_prompt(records, MEASURES[measure]) for records in (ours, theirs))
    shared = sorted(mine.keys() & reference.keys())
    if not shared:
        return None
    differences = np.array([mine[id_] - reference[id_] for id_ in shared])
    return {
        "method": name,
        "measure": measure,
        "pairs": len(shared),
        "difference": float(differences.mean()),
        "interval_95": bootstrap_mean(differences.tolist()),
        "better": int((differences > 0).sum()),
        "worse": int((differences < 0).sum()),
        "p": _sign_test(differences) if measure == "neutralised" else _signed_rank(differences),
    }


def _sign_test(differences: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    more, less = int((differences > 0).sum()), int((differences < 0).sum())
    return float(_scipy_stats().binomtest(more, more + less).pvalue) if more + less else 1.0


def _signed_rank(differences: np.ndarray[Any, np.dtype[np.float64]]) -> float | None:
    """None where there are too few pairs for the test to say anything."""
    apart = differences[differences != 0]
    if not len(apart) and len(differences):
        return 1.0
    return float(_scipy_stats().wilcoxon(apart).pvalue) if len(apart) >= LEAST_PAIRS else None


def _adjusted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    tested = [row for row in rows if row["p"] is not None]
    adjusted = _scipy_stats().false_discovery_control([row["p"] for row in tested]) if tested else []
    for row, value in zip(tested, adjusted, strict=True):
        row["p_adjusted"] = float(value)
    return rows


def _scipy_stats() -> Any:
    try:
        from scipy import stats
    except ImportError:
        raise MissingExtraError(
            "intervals, tests and the report need scipy and matplotlib; run: pip install 'tta-middleware[eval]'"
        ) from None
    return stats
