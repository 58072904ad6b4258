"""Runs methods over prompt sets and sums up what they did; the engine of ``tta eval``."""

from tta_middleware.evaluation.datasets import Prompt, read_prompts
from tta_middleware.evaluation.judges import Judge, Reviewer, resolve_judge
from tta_middleware.evaluation.methods import Bench, Comparator, comparators
from tta_middleware.evaluation.runner import Plan, evaluate
from tta_middleware.evaluation.store import RunFolder
from tta_middleware.evaluation.summary import summarise, to_markdown

__all__ = [
    "Bench",
    "Comparator",
    "Judge",
    "Plan",
    "Prompt",
    "Reviewer",
    "RunFolder",
    "comparators",
    "evaluate",
    "read_prompts",
    "resolve_judge",
    "summarise",
    "to_markdown",
]
