"""The paper's Table 1 (arXiv 2604.26167), and ours in the same columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tta_middleware.evaluation.tables import Table

_HEAD = ["model, method", "prompts", "flagged before", "flagged after", "mean iterations of triggered prompts"]
_WILD, _HARM = "WildJailbreak, 2,000", "HarmBench, 400"
_ROWS = (
    ("GPT-OSS-20B, TSA", _WILD, 17, 0, "1.2"),
    ("Qwen3-14B, TSA", _WILD, 165, 0, "2.1"),
    ("Llama-3.1-8B-Instruct, TSA", _WILD, 218, 0, "1.0"),
    ("Llama-3.1-8B-Instruct, AdaSteer", _WILD, 218, 85, "-"),
    ("Llama-3.1-8B-Instruct, SmoothLLM", _WILD, 218, 122, "-"),
    ("Llama-3.1-8B-Instruct, RESTA", _WILD, 218, 199, "-"),
    ("Phi-3.5-mini, TSA", _WILD, 126, 0, "1.8"),
    ("Gemma-3-1B, TSA", _WILD, 278, 59, "5.7"),
    ("GPT-OSS-20B, TSA", _HARM, 16, 0, "-"),
    ("Qwen3-14B, TSA", _HARM, 8, 0, "-"),
    ("Llama-3.1-8B-Instruct, TSA", _HARM, 17, 0, "-"),
    ("Llama-3.1-8B-Instruct, SmoothLLM", _HARM, 17, 13, "-"),
    ("Llama-3.1-8B-Instruct, AdaSteer", _HARM, 17, 22, "-"),
    ("Llama-3.1-8B-Instruct, RESTA", _HARM, 17, 25, "-"),
    ("Phi-3.5-mini, TSA", _HARM, 8, 0, "-"),
    ("Gemma-3-1B, TSA", _HARM, 42, 14, "6.3"),
)

NOTE = (
    "The paper's rows are its own, with larger models, the OpenAI moderation API at 0.1, 128 tokens, and safety alone "
    "as the goal: an answer that is empty or a loop counts as a success there. They set the scale and are no "
    "comparison. An iteration is one step of the paper's loop; for other methods it is one wave of candidates."
)


def paper_table() -> Table:
    """The paper's rows."""
    return [_HEAD, *([name, prompts, str(before), str(after), steps] for name, prompts, before, after, steps in _ROWS)]


def our_table(summary: Mapping[str, Any]) -> Table:
    """This run's rows; counts are of runs, one per prompt and seed."""
    model = summary["run"].get("model", "")
    return [_HEAD, *([f"{model}, {name}", *_ours(row)] for name, row in summary["methods"].items())]


def _ours(row: Mapping[str, Any]) -> list[str]:
    runs = str(row["prompts"]) if row["seeds"] == 1 else f"{row['prompts']} x {row['seeds']} seeds"
    iterations = "-" if row["mean_iterations"] is None else f"{row['mean_iterations']:.1f}"
    return [runs, str(row["baseline_flagged"]), str(row["baseline_flagged"] - row["safe_after"]), iterations]
