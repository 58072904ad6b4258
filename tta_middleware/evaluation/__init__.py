"""Runs methods over prompt sets and sums up what they did; the engine of ``tta eval``."""

from tta_middleware.evaluation.comparators import COMPARATORS, Bench, Comparator, comparators
from tta_middleware.evaluation.judges import Judge, Reviewer, resolve_judge
from tta_middleware.evaluation.run_folder import RunFolder
from tta_middleware.evaluation.runner import Plan, evaluate
from tta_middleware.evaluation.summary import summarise
from tta_middleware.evaluation.tables import to_markdown
from tta_middleware.files.prompts import Prompt, read_prompts, read_sets

__all__ = [
    "COMPARATORS",
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
    "read_sets",
    "resolve_judge",
    "summarise",
    "to_markdown",
]
