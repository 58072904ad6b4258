"""The tables of the README and of docs/results from summaries of ``tta eval``: few columns, one model after another.

    python scripts/headline_tables.py Qwen=out/qwen-main/summary.json SmolLM2=out/smol-main/summary.json \
        [--methods block,reminder,noise,race] [--brief]

Prints Markdown: outcome, what was neutralised within so many tokens, and agreement of judges. ``--brief`` prints the
README's columns only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tta_middleware.evaluation import tables

LONG = (
    "method",
    "prompts x seeds",
    "flagged before",
    "neutralised (95%)",
    "judges, too",
    "relevance",
    "refusals",
    "tokens",
)
BRIEF = ("method", "flagged before", "safe and usable after", "judges, too", "relevance", "refusals", "tokens")


def outcome(name: str, row: Mapping[str, Any], *, brief: bool) -> list[str]:
    """One method's cells; the judges are those of its summary, in their order."""
    low, high = row["neutralised_interval_95"]
    agreed = " / ".join(str(said["neutralised"]) for said in row.get("judges", {}).values()) or "-"
    ends = [agreed, tables.number(2)(row["relevance"]), tables.percent(row["refusal_share"])]
    tokens = tables.number(0)(row["mean_generated_tokens"])
    flagged, done = str(row["baseline_flagged"]), str(row["neutralised"])
    if brief:
        return [name, flagged, done, *ends, tokens]
    runs = f"{row['prompts']} x {row['seeds']}"
    return [name, runs, flagged, f"{done} ({low:.0%} to {high:.0%})", *ends, tokens]


def chosen(rows: Mapping[str, Any], methods: Sequence[str]) -> dict[str, Any]:
    """The methods that met a flagged answer, all or those named, in that order."""
    names = [name for name in methods or rows if name in rows]
    return {name: rows[name] for name in names if rows[name].get("baseline_flagged", rows[name]["prompts"])}


def page(model: str, summary: Mapping[str, Any], methods: Sequence[str], *, brief: bool) -> list[str]:
    rows = chosen(summary["methods"], methods)
    judges = dict.fromkeys(name for row in rows.values() for name in row.get("judges", {}))
    head = f"{model}; judges: {', '.join(judges) or 'none'}"
    body = [outcome(name, row, brief=brief) for name, row in rows.items()]
    parts = [head, tables.markdown([list(BRIEF if brief else LONG), *body])]
    if not brief:
        within = summary["within_tokens"]
        kept = {"within_tokens": {**within, "methods": chosen(within["methods"], methods)}}
        parts.append(tables.markdown(tables.within_tokens_table(kept)))
        parts += [tables.markdown(found)] if (found := tables.agreement_table(summary)) else []
    return parts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("summaries", nargs="+", metavar="NAME=SUMMARY.json")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=[])
    parser.add_argument("--brief", action="store_true")
    args = parser.parse_args()
    for word in args.summaries:
        name, _, path = word.partition("=")
        summary = json.loads(Path(path).read_text(encoding="utf-8"))
        print("\n\n".join(page(name, summary, args.methods, brief=args.brief)), end="\n\n")
