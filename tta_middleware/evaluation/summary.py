"""Tables from records. Means, shares and medians are over the prompts whose undefended answer was flagged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tta_middleware.evaluation.jsonl import Record
from tta_middleware.evaluation.statistics import mean, percentile, wilson


def summarise(records: Sequence[Record], run: Mapping[str, Any]) -> dict[str, Any]:
    """The content of ``summary.json``: ``run`` and one row per method in the order of their first record."""
    methods = dict.fromkeys(record["method"] for record in records)
    rows = {name: _row([r for r in records if r["method"] == name]) for name in methods}
    return {"run": dict(run), "methods": rows}


def _row(records: Sequence[Record]) -> dict[str, Any]:
    flagged = [record for record in records if record["baseline"]["flagged"]]
    neutralised = sum(record["neutralised"] is True for record in flagged)
    return {
        "prompts": len(records),
        "not_scored": sum(record["baseline"]["flagged"] is None for record in records),
        "baseline_flagged": len(flagged),
        "safe_after": sum(not record["final"]["flagged"] for record in flagged),
        "neutralised": neutralised,
        "neutralised_share": neutralised / len(flagged) if flagged else None,
        "neutralised_interval_95": wilson(neutralised, len(flagged)),
        "usable_share": mean([bool(record["final"]["usable"]) for record in flagged]),
        "mean_generations": mean(_column(flagged, "generations")),
        "mean_generated_tokens": mean(_column(flagged, "generated_tokens")),
        "mean_moderation_calls": mean(_column(flagged, "moderation_calls")),
        "seconds_p50": percentile(_column(flagged, "seconds"), 0.5),
        "seconds_p95": percentile(_column(flagged, "seconds"), 0.95),
        "median_relative_move": percentile(_column(flagged, "relative_move"), 0.5),
        "decodes_to_original": sum(record["decodes_to_original"] for record in flagged),
        **_judged([record for record in flagged if "judge" in record]),
    }


def _judged(records: Sequence[Record]) -> dict[str, Any]:
    if not records:
        return {}
    return {
        "judge_baseline_flagged": sum(record["judge"]["baseline"]["flagged"] for record in records),
        "judge_neutralised": sum(
            record["neutralised"] is True and not record["judge"]["final"]["flagged"] for record in records
        ),
    }


def _column(records: Iterable[Record], key: str) -> list[float]:
    return [float(record[key]) for record in records]


def _number(digits: int) -> Callable[[Any], str]:
    return lambda value: "-" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _interval(value: Sequence[float] | None) -> str:
    return "-" if value is None else f"{value[0]:.0%} to {value[1]:.0%}"


_COLUMNS: Mapping[str, tuple[str, Callable[[Any], str]]] = {
    "prompts": ("prompts", str),
    "baseline_flagged": ("flagged before", str),
    "safe_after": ("safe after", str),
    "neutralised": ("neutralised", str),
    "neutralised_interval_95": ("95% interval", _interval),
    "usable_share": ("usable", _percent),
    "judge_baseline_flagged": ("judge: flagged before", str),
    "judge_neutralised": ("judge: neutralised", str),
    "mean_generations": ("generations", _number(1)),
    "mean_generated_tokens": ("tokens", _number(0)),
    "mean_moderation_calls": ("moderation calls", _number(1)),
    "seconds_p50": ("seconds p50", _number(1)),
    "seconds_p95": ("seconds p95", _number(1)),
    "median_relative_move": ("relative move", _number(2)),
    "decodes_to_original": ("decodes to original", str),
}

NOTE = (
    "Neutralised means safe and usable. From 'safe after' on, counts, means and percentiles are over the prompts whose "
    "undefended answer was flagged; generations, tokens and moderation calls include the undefended answer's."
)


def to_markdown(summary: Mapping[str, Any]) -> str:
    """A Markdown page: the table, how to read it, and what was run."""
    rows = summary["methods"]
    columns = [key for key in _COLUMNS if any(key in row for row in rows.values())]
    head = ["method", *(_COLUMNS[key][0] for key in columns)]
    body = [[name, *(_cell(row, key) for key in columns)] for name, row in rows.items()]
    rule = ["---", *("---:" for _ in columns)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *body])
    return f"{table}\n\n{NOTE}\n\n{_environment(summary['run'])}\n"


def _cell(row: Mapping[str, Any], key: str) -> str:
    return _COLUMNS[key][1](row[key]) if key in row else "-"


def _environment(run: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items())
    settings = ", ".join(f"{key} {value}" for key, value in run.items() if key not in ("command", "versions"))
    return f"Command: `{run.get('command', '')}`  \nSettings: {settings}  \nVersions: {versions}"
