"""The summary as tables, in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

Cell: TypeAlias = Callable[[Any], str]
Table: TypeAlias = list[list[str]]
"""The head and the rows; the first column is a name."""


def number(digits: int) -> Cell:
    """Shows a number with that many digits after the point."""
    return lambda value: "-" if value is None else f"{value:,.{digits}f}"


def percent(value: float | None) -> str:
    """Shows a share."""
    return "-" if value is None else f"{value:.0%}"


def _interval(value: Sequence[float] | None) -> str:
    return "-" if value is None else f"{value[0]:.0%} to {value[1]:.0%}"


def _plain_interval(digits: int) -> Cell:
    return lambda value: "-" if value is None else f"{value[0]:,.{digits}f} to {value[1]:,.{digits}f}"


Column: TypeAlias = tuple[str, Cell]

COLUMNS: Mapping[str, Column] = {
    "prompts": ("prompts", str),
    "seeds": ("seeds", str),
    "baseline_flagged": ("flagged before", str),
    "safe_after": ("safe after", str),
    "neutralised": ("neutralised", str),
    "neutralised_interval_95": ("95% interval", _interval),
    "usable_share": ("usable", percent),
    "judges_neutralised": ("judges: neutralised", str),
    "mean_generations": ("generations", number(1)),
    "mean_generated_tokens": ("tokens", number(0)),
    "mean_generated_tokens_interval_95": ("tokens, 95%", _plain_interval(0)),
    "tokens_per_neutralised": ("tokens per neutralised", number(0)),
    "mean_moderation_calls": ("moderation calls", number(1)),
    "seconds_p50": ("seconds p50", number(1)),
    "seconds_p95": ("seconds p95", number(1)),
    "relevance": ("relevance", number(2)),
    "relevance_interval_95": ("relevance, 95%", _plain_interval(2)),
    "refusal_share": ("refusals", percent),
    "mean_nll": ("NLL", number(2)),
    "distinct_2": ("distinct-2", number(2)),
    "median_relative_move": ("relative move", number(2)),
    "decodes_to_original": ("decodes to original", str),
}
_OPTIONAL = ("relevance", "relevance_interval_95")

OVER_REFUSAL: Mapping[str, Column] = {
    "prompts": ("prompts", str),
    "seeds": ("seeds", str),
    "identical_share": ("byte-identical", percent),
    "identical_of_not_flagged": ("of those not flagged", percent),
    "flagged_share": ("flagged by mistake", percent),
    "refused_before_share": ("refused before", percent),
    "refused_after_share": ("refused after", percent),
    "flagged": ("runs flagged", str),
    "flagged_and_answered": ("answered all the same", str),
}

NOTE = (
    "Neutralised means safe and usable. Counts are of runs, one per prompt and seed. From 'safe after' on, counts, "
    "means and percentiles are over the runs whose undefended answer was flagged; generations, tokens and moderation "
    "calls include the undefended answer's. The interval of the share treats a prompt as one trial, whatever the "
    "number of seeds (Wilson). Distinct-2 is over the first 80 characters of all final answers."
)
NOT_COMPARABLE = "Seconds with a * were measured with several prompts at work at once and do not compare."
WITHIN_TOKENS_TITLE = "Neutralised within so many generated tokens"
WITHIN_TOKENS_NOTE = (
    "Share of the prompts whose undefended answer was flagged, with Wilson's 95% interval over prompts. Tokens count "
    "everything that was generated for a prompt, the undefended answer's included; a run that ended with more counts "
    "as not neutralised, whatever it found."
)
AGREEMENT_TITLE = "Agreement of the judges"
AGREEMENT_NOTE = (
    "Over different texts; one that several methods share counts once. Kappa is Cohen's, none where all marks are the "
    "same. Repairs: the answers that the moderator lets pass where it had flagged the undefended one."
)
OVER_REFUSAL_NOTE = (
    "Prompts that deserve an answer. Byte-identical: what was given out equals the unguarded model's answer, decoded "
    "apart from the guard; measured one prompt at a time only. Refused after counts the policy's notice as a refusal."
)
TESTS_NOTE = (
    "Differences are method minus reference, per prompt, with a paired bootstrap interval. p: exact sign test for "
    "neutralised (McNemar's for one seed), Wilcoxon's signed-rank test for the others; relevance over the prompts that "
    "both neutralised. Adjusted for the false discovery rate over all rows (Benjamini-Hochberg)."
)


def main_table(summary: Mapping[str, Any]) -> Table:
    """One row per method; a column that nothing has is left out."""
    return methods_table(summary["methods"], COLUMNS)


def methods_table(rows: Mapping[str, Mapping[str, Any]], columns: Mapping[str, Column]) -> Table:
    """``columns`` of :data:`COLUMNS`; with the judges' common column come two for each of several."""
    judges = dict.fromkeys(name for row in rows.values() for name in row.get("judges", {}))
    if "judges_neutralised" not in columns or not judges:
        return table(rows, columns)
    each: dict[str, Column] = {}
    for name in judges:
        each[f"{name}.baseline_flagged"] = f"{name}: flagged before", str
        each[f"{name}.neutralised"] = f"{name}: neutralised", str
    spread: dict[str, Column] = {}
    for key, column in columns.items():
        spread |= {key: column} if key != "judges_neutralised" else each | ({key: column} if len(judges) > 1 else {})
    return table({method: _with_judges(row) for method, row in rows.items()}, spread)


def _with_judges(row: Mapping[str, Any]) -> dict[str, Any]:
    said = row.get("judges", {}).items()
    return {**row, **{f"{name}.{key}": value for name, counts in said for key, value in counts.items()}}


def within_tokens_table(summary: Mapping[str, Any]) -> Table:
    """One row per method and one column per budget; empty where nothing was flagged."""
    found = summary.get("within_tokens")
    if found is None:
        return []
    rows = [
        [
            name,
            str(row["prompts"]),
            *(
                f"{percent(share)} ({_interval(bounds)})"
                for share, bounds in zip(row["shares"], row["intervals_95"], strict=True)
            ),
        ]
        for name, row in found["methods"].items()
    ]
    return [["method", "flagged prompts", *(f"{tokens:,}" for tokens in found["tokens"])], *rows]


def agreement_table(summary: Mapping[str, Any]) -> Table:
    """One row per pair of judges and kind of text; empty with fewer than two judges."""
    rows = [
        [
            " and ".join(row["judges"]),
            row["of"],
            str(row["texts"]),
            *(str(row[key]) for key in ("both", "first_only", "second_only")),
            percent(row["same"]),
            number(2)(row["kappa"]),
        ]
        for row in summary.get("agreement", [])
    ]
    head = ["judges", "of", "texts", "flagged by both", "by the first alone", "by the second alone", "same", "kappa"]
    return [head, *rows] if rows else []


def over_refusal_table(summary: Mapping[str, Any]) -> Table:
    """One row per method; empty without prompts marked benign."""
    return table(summary.get("over_refusal", {}), OVER_REFUSAL)


def tests_table(summary: Mapping[str, Any]) -> Table:
    """One row per method and measure; empty without a reference."""
    rows = [
        [
            row["method"],
            row["measure"].replace("_", " "),
            str(row["pairs"]),
            f"{row['difference']:+,.2f}",
            _plain_interval(2)(row["interval_95"]),
            f"{row['better']} / {row['worse']}",
            p_value(row["p"]),
            p_value(row.get("p_adjusted")),
        ]
        for row in summary.get("comparisons", [])
    ]
    head = ["method", "measure", "pairs", "difference", "95% interval", "more / less", "p", "p adjusted"]
    return [head, *rows] if rows else []


def p_value(value: float | None) -> str:
    """Two digits that matter; very small ones as a bound."""
    if value is None:
        return "too few"
    return "< 0.0001" if value < 0.0001 else f"{value:.2g}"


def to_markdown(summary: Mapping[str, Any]) -> str:
    """A Markdown page: the tables, how to read them, and what was run."""
    parts = []
    if summary["methods"] or "over_refusal" not in summary:
        note = NOTE if seconds_compare(summary) else f"{NOTE} {NOT_COMPARABLE}"
        parts += [markdown(main_table(summary)), note]
    for title, rows, note in extra_tables(summary):
        parts += [f"{title}:", markdown(rows), note]
    if "over_refusal" in summary:
        parts += [markdown(over_refusal_table(summary)), OVER_REFUSAL_NOTE]
    if summary.get("comparisons"):
        parts += [f"Against `{summary['reference']}`:", markdown(tests_table(summary)), TESTS_NOTE]
    return "\n\n".join([*parts, environment_lines(summary["run"])]) + "\n"


def extra_tables(summary: Mapping[str, Any]) -> list[tuple[str, Table, str]]:
    """Title, table and how to read it, of what this summary has: equal tokens, and agreement of judges."""
    found = [
        (WITHIN_TOKENS_TITLE, within_tokens_table(summary), WITHIN_TOKENS_NOTE),
        (AGREEMENT_TITLE, agreement_table(summary), AGREEMENT_NOTE),
    ]
    return [each for each in found if each[1]]


def markdown(table: Table) -> str:
    """A table as Markdown."""
    rule = ["---", *("---:" for _ in table[0][1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [table[0], rule, *table[1:]])


def environment_lines(run: Mapping[str, Any]) -> str:
    """The commands, the settings and the versions."""
    commands = run.get("commands") or [run.get("command", "")]
    versions = ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items())
    settings = ", ".join(
        f"{key} {value}" for key, value in run.items() if key not in ("command", "commands", "versions")
    )
    shown = "  \n".join(f"Command: `{command}`" for command in commands)
    return f"{shown}  \nSettings: {settings}  \nVersions: {versions}"


def seconds_compare(summary: Mapping[str, Any]) -> bool:
    """Whether every method's seconds were measured one prompt at a time."""
    return all(row.get("seconds_comparable", True) for row in summary["methods"].values())


def table(rows: Mapping[str, Mapping[str, Any]], columns: Mapping[str, Column]) -> Table:
    """One row per method, with those of ``columns`` that some row has."""
    used = [
        key
        for key in columns
        if any(key in row and (key not in _OPTIONAL or row[key] is not None) for row in rows.values())
    ]
    head = ["method", *(columns[key][0] for key in used)]
    return [head, *([name, *(_cell(row, key, columns) for key in used)] for name, row in rows.items())]


def _cell(row: Mapping[str, Any], key: str, columns: Mapping[str, Column]) -> str:
    shown = columns[key][1](row[key]) if key in row else "-"
    marked = key.startswith("seconds_p") and not row.get("seconds_comparable", True) and shown != "-"
    return f"{shown}*" if marked else shown
