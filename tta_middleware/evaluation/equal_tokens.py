"""What methods reach with the same number of generated tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from tta_middleware.evaluation.comparisons import per_prompt
from tta_middleware.evaluation.statistics import mean, wilson
from tta_middleware.files.jsonl import Record

ANSWERS = (2, 4, 8, 16, 32)
"""Budgets, in answers of full length; the undefended one is among them."""


def within_tokens(records: Sequence[Record], max_new_tokens: int) -> dict[str, Any]:
    """Per method, the share of flagged prompts that were neutralised with at most so many tokens, and its 95% Wilson
    interval.

    Tokens are all that were generated for the prompt, the undefended answer's included. A run that ended with more
    counts as not neutralised, whatever it found. With several seeds a prompt is one trial with the mean of its runs.
    """
    budgets = [answers * max_new_tokens for answers in ANSWERS]
    methods = dict.fromkeys(record["method"] for record in records)
    flagged = [record for record in records if record["baseline"]["flagged"]]
    rows = {name: _row([r for r in flagged if r["method"] == name], budgets) for name in methods}
    return {"tokens": budgets, "methods": {name: row for name, row in rows.items() if row["prompts"]}}


def _row(flagged: Sequence[Record], budgets: Sequence[int]) -> dict[str, Any]:
    row: dict[str, Any] = {"prompts": len({str(record["id"]) for record in flagged}), "shares": [], "intervals_95": []}
    for tokens in budgets:
        done = list(per_prompt(flagged, partial(_done, most=tokens)).values())
        share = mean(done)
        row["shares"].append(share)
        row["intervals_95"].append(wilson((share or 0.0) * len(done), len(done)))
    return row


def _done(record: Record, most: int) -> float:
    return float(record["neutralised"] is True and record["generated_tokens"] <= most)
