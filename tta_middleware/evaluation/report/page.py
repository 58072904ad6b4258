"""The page: tables, plots, commands; no script and nothing from elsewhere, so that it can be kept and mailed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from tta_middleware.evaluation import tables
from tta_middleware.evaluation.records import CUT
from tta_middleware.evaluation.report import paper, plots
from tta_middleware.evaluation.report.series import flagged_by_method
from tta_middleware.files.jsonl import Record

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1c1c1c;background:#fff;max-width:1080px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin:2.2rem 0 .4rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:.28rem .6rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}
th{font-weight:600;white-space:normal;vertical-align:bottom}th:first-child,td:first-child{text-align:left}
td.text{white-space:normal;text-align:left}tr:hover td{background:#f5f7fa}
figure{margin:1rem 0}svg{max-width:860px;width:100%;height:auto}
p.note,figcaption{color:#555;font-size:13px;max-width:75ch}
pre{background:#f5f5f5;padding:.7rem;overflow-x:auto;font-size:12px;white-space:pre-wrap;overflow-wrap:anywhere}
"""

_OUTCOME = (
    "prompts", "seeds", "baseline_flagged", "safe_after", "neutralised", "neutralised_interval_95", "usable_share",
    "judges_neutralised", "refusal_share", "decodes_to_original",
)  # fmt: skip
_PLOTS: tuple[tuple[str, Callable[[plots.Methods, str], str], str], ...] = (
    ("Share neutralised against generated tokens", plots.survival,
     "The further left and up, the cheaper. A line that levels off below 1 gave up on the rest."),
    ("Safety against closeness", plots.fronts,
     "Up is safer and usable, right is closer to the question; methods that change the words have no move."),
    ("Score trajectories", plots.trajectories,
     "Median over the flagged prompts of the lowest score found so far; a run that has ended keeps its value."),
    ("Scores before and after", plots.histograms,
     "The undefended answers and what each method ended with, on the flagged prompts."),
    ("By category", plots.categories,
     "The prompt's category, or the one that the moderator flagged where the prompts have none, with its number of "
     "prompts; at most eight."),
)  # fmt: skip


def to_html(summary: Mapping[str, Any], records: Sequence[Record], *, examples: int = 0) -> str:
    """One self-contained page for ``summary`` and the records that it was made from.

    ``examples``: beginnings of that many answers per method, before and after, each cut to 80 characters. With 0 the
    page holds no word of any prompt or answer.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    methods = flagged_by_method(records)
    run = summary["run"]
    title = f"Evaluation of {run.get('model', 'a model')} with the moderator {run.get('moderator', '')}"
    parts = [f"<h1>{escape(title)}</h1>", _paragraph(_what(run)), *_tables(summary)]
    if methods:
        parts += [_figure(at, methods) for at in range(len(_PLOTS))]
        parts += [_section("The paper's Table 1, and this run", _html(paper.our_table(summary)), paper.NOTE)]
        parts += [f'<div class="scroll">{_html(paper.paper_table())}</div>']
    parts += [_examples(methods, examples)] if examples and methods else []
    parts += [_section("How to get this again", f"<pre>{escape(_commands(run))}</pre>", _environment(run))]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body>\n{chr(10).join(parts)}\n</body></html>\n"
    )


def _tables(summary: Mapping[str, Any]) -> list[str]:
    parts = []
    if summary["methods"]:
        costs = {key: value for key, value in tables.COLUMNS.items() if key not in _OUTCOME}
        outcome = {key: tables.COLUMNS[key] for key in _OUTCOME}
        note = tables.NOTE if tables.seconds_compare(summary) else f"{tables.NOTE} {tables.NOT_COMPARABLE}"
        parts += [_section("Outcome", _html(tables.methods_table(summary["methods"], outcome)), note)]
        parts += [_section("Cost and closeness", _html(tables.table(summary["methods"], costs)))]
    parts += [_section(title, _html(rows), note) for title, rows, note in tables.extra_tables(summary)]
    if "over_refusal" in summary:
        parts += [_section("Over-refusal", _html(tables.over_refusal_table(summary)), tables.OVER_REFUSAL_NOTE)]
    if summary.get("comparisons"):
        head = f"Against {summary['reference']}"
        parts += [_section(head, _html(tables.tests_table(summary)), tables.TESTS_NOTE)]
    return parts


def _figure(at: int, methods: plots.Methods) -> str:
    title, draw, caption = _PLOTS[at]
    svg = draw(methods, f"plot{at}").replace("<svg ", f'<svg aria-label="{escape(title)}" ', 1)
    return f"<h2>{escape(title)}</h2>\n<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _section(title: str, body: str, note: str = "") -> str:
    return f'<h2>{escape(title)}</h2>\n<div class="scroll">{body}</div>' + (_paragraph(note, "note") if note else "")


def _paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def _html(table: tables.Table, text_from: int = 999) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table[0])
    rows = "\n".join(
        f"<tr>{''.join(_cell(cell, at, text_from) for at, cell in enumerate(row))}</tr>" for row in table[1:]
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table>"


def _cell(cell: str, at: int, text_from: int) -> str:
    return f'<td class="text">{escape(cell)}</td>' if at >= text_from else f"<td>{escape(cell)}</td>"


def _examples(methods: plots.Methods, count: int) -> str:
    rows = [
        [name, record["baseline"]["text"][:CUT], (record["final"]["text"] or "")[:CUT]]
        for name, records in methods.items()
        for record in records[:count]
    ]
    note = f"At most the first {CUT} characters of each answer."
    return _section("Beginnings of answers", _html([["method", "before", "after"], *rows], text_from=1), note)


def _what(run: Mapping[str, Any]) -> str:
    left_out = ("command", "commands", "versions", "model", "moderator")
    return ", ".join(f"{key.replace('_', ' ')}: {value}" for key, value in run.items() if key not in left_out)


def _commands(run: Mapping[str, Any]) -> str:
    return "\n".join(run.get("commands") or [run.get("command", "")])


def _environment(run: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items())
