"""Figures from records. Means, shares and medians are over the prompts whose undefended answer was flagged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tta_middleware.evaluation.agreement import agreements
from tta_middleware.evaluation.comparisons import (
    Measure,
    bootstrap_mean,
    compare,
    neutralised,
    per_prompt,
    relevance_if_neutralised,
)
from tta_middleware.evaluation.equal_tokens import within_tokens
from tta_middleware.evaluation.measures import distinct_n
from tta_middleware.evaluation.records import CUT
from tta_middleware.evaluation.statistics import mean, percentile, wilson
from tta_middleware.files.jsonl import Record

MAX_NEW_TOKENS = 64
"""Where the run does not say: the default of ``tta eval``."""


def summarise(
    records: Sequence[Record], run: Mapping[str, Any], *, intervals: bool = False, reference: str | None = None
) -> dict[str, Any]:
    """The content of ``summary.json``.

    ``run``, one row per method in the order of their first record, what was neutralised with equal tokens, how far
    several judges agree, and one row of ``over_refusal`` per method where there are prompts marked benign, which the
    other rows leave out. ``intervals`` adds bootstrap intervals, and ``reference`` paired tests against that method.

    Raises:
        ConfigurationError: there are no results of ``reference``.
        MissingExtraError: ``intervals`` or ``reference`` was asked for and scipy is not installed.
    """
    counted = [record for record in records if record.get("benign") is not True]
    benign = [record for record in records if record.get("benign") is True]
    summary: dict[str, Any] = {
        "run": dict(run),
        "methods": _rows(counted, lambda found: _row(found, intervals=intervals)),
    }
    if any(row["baseline_flagged"] for row in summary["methods"].values()):
        summary["within_tokens"] = within_tokens(counted, int(run.get("max_new_tokens", MAX_NEW_TOKENS)))
    if agreed := agreements(records):
        summary["agreement"] = agreed
    if benign:
        summary["over_refusal"] = _rows(benign, over_refusal)
    if reference is not None and counted:
        summary["reference"] = reference
        summary["comparisons"] = compare(counted, reference)
    return summary


def _rows(records: Sequence[Record], row: Callable[[Sequence[Record]], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    methods = dict.fromkeys(record["method"] for record in records)
    return {name: row([r for r in records if r["method"] == name]) for name in methods}


def over_refusal(records: Sequence[Record]) -> dict[str, Any]:
    """What a method does to prompts that deserve an answer; shares are over all of them."""
    flagged = [record for record in records if record["baseline"]["flagged"]]
    answered = [r for r in flagged if r["neutralised"] is True and not r["refused"]]
    clean = [record for record in records if record["baseline"]["flagged"] is False]
    return {
        "prompts": len({str(record["id"]) for record in records}),
        "seeds": len({record["seed"] for record in records}),
        "identical_share": mean(_column(records, "identical")),
        "identical_of_not_flagged": mean(_column(clean, "identical")),
        "flagged_share": len(flagged) / len(records),
        "refused_before_share": mean([bool(record["baseline"]["refusal"]) for record in records]),
        "refused_after_share": mean([bool(record["refused"]) for record in records]),
        "flagged": len(flagged),
        "flagged_and_answered": len(answered),
        "flagged_and_answered_share": len(answered) / len(flagged) if flagged else None,
    }


def _row(records: Sequence[Record], *, intervals: bool) -> dict[str, Any]:
    flagged = [record for record in records if record["baseline"]["flagged"]]
    shares = per_prompt(flagged, neutralised)
    share = mean(list(shares.values()))
    return {
        "prompts": len({str(record["id"]) for record in records}),
        "seeds": len({record.get("seed", 0) for record in records}),
        "not_scored": sum(record["baseline"]["flagged"] is None for record in records),
        "baseline_flagged": len(flagged),
        "safe_after": sum(not record["final"]["flagged"] for record in flagged),
        "neutralised": sum(record["neutralised"] is True for record in flagged),
        "neutralised_share": share,
        "neutralised_interval_95": wilson((share or 0.0) * len(shares), len(shares)),
        "usable_share": mean([bool(record["final"]["usable"]) for record in flagged]),
        **_costs(flagged),
        **_answers(flagged),
        **_judged([record for record in flagged if record.get("judges")]),
        **(_intervals(flagged) if intervals else {}),
    }


def _costs(flagged: Sequence[Record]) -> dict[str, Any]:
    won = sum(record["neutralised"] is True for record in flagged)
    return {
        "mean_generations": mean(_column(flagged, "generations")),
        "mean_generated_tokens": mean(_column(flagged, "generated_tokens")),
        "tokens_per_neutralised": sum(_column(flagged, "generated_tokens")) / won if won else None,
        "mean_moderation_calls": mean(_column(flagged, "moderation_calls")),
        "mean_iterations": mean(_column(flagged, "iterations")),
        "seconds_p50": percentile(_column(flagged, "seconds"), 0.5),
        "seconds_p95": percentile(_column(flagged, "seconds"), 0.95),
        "seconds_comparable": all(record.get("concurrency", 1) == 1 for record in flagged),
    }


def _answers(flagged: Sequence[Record]) -> dict[str, Any]:
    """How good the final answers are; relevance also over the neutralised ones alone."""
    final = [record["final"] for record in flagged]
    return {
        "median_relative_move": percentile(_column(flagged, "relative_move"), 0.5),
        "decodes_to_original": sum(record["decodes_to_original"] for record in flagged),
        "relevance": mean(_column(final, "relevance")),
        "relevance_neutralised": mean([v for r in flagged if (v := relevance_if_neutralised(r)) is not None]),
        "baseline_relevance": mean(_column([record["baseline"] for record in flagged], "relevance")),
        "refusal_share": mean(_column(final, "refusal")),
        "mean_nll": mean(_column(final, "nll")),
        # The beginnings are there whole for every answer, flagged or not, and are of one length.
        "distinct_2": distinct_n((answer["text"][:CUT] for answer in final if answer["text"]), 2),
    }


def _judged(records: Sequence[Record]) -> dict[str, Any]:
    if not records:
        return {}
    names = dict.fromkeys(name for record in records for name in record["judges"])
    return {
        "judges": {name: _by_one([record for record in records if name in record["judges"]], name) for name in names},
        "judges_neutralised": sum(
            record["neutralised"] is True and not any(said["final"]["flagged"] for said in record["judges"].values())
            for record in records
        ),
    }


def _by_one(records: Sequence[Record], name: str) -> dict[str, int]:
    return {
        "baseline_flagged": sum(record["judges"][name]["baseline"]["flagged"] for record in records),
        "neutralised": sum(
            record["neutralised"] is True and not record["judges"][name]["final"]["flagged"] for record in records
        ),
    }


def _intervals(flagged: Sequence[Record]) -> dict[str, Any]:
    measures: dict[str, Measure] = {
        "mean_generated_tokens": lambda record: float(record["generated_tokens"]),
        "relevance": lambda record: record["final"].get("relevance"),
    }
    found = {name: list(per_prompt(flagged, measure).values()) for name, measure in measures.items()}
    return {f"{name}_interval_95": bootstrap_mean(values) for name, values in found.items()}


def _column(records: Iterable[Mapping[str, Any]], key: str) -> list[float]:
    return [float(record[key]) for record in records if record.get(key) is not None]
