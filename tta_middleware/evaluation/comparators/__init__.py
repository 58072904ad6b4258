"""The methods that an evaluation compares, by name.

A new one is a class with :class:`Comparator`'s shape and an entry in :data:`COMPARATORS`. Every search method that the
registry knows is one, too.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from tta_middleware.errors import ConfigurationError
from tta_middleware.evaluation.comparators.best_of_n import BestOfN
from tta_middleware.evaluation.comparators.block import Block
from tta_middleware.evaluation.comparators.care import CARE
from tta_middleware.evaluation.comparators.comparator import Bench, Comparator
from tta_middleware.evaluation.comparators.guarded import Guarded
from tta_middleware.evaluation.comparators.random_step import RandomStep
from tta_middleware.evaluation.comparators.reminder import Reminder
from tta_middleware.evaluation.comparators.smoothing import Smoothing, SmoothLLM
from tta_middleware.evaluation.comparators.variants import variant
from tta_middleware.methods import TSA, Resample
from tta_middleware.registry import METHODS, names, resolve_method

__all__ = ["COMPARATORS", "Bench", "Comparator", "Guarded", "comparators", "known"]

COMPARATORS: Final[Mapping[str, Callable[[], Comparator]]] = {
    "none": lambda: Guarded("none", None),
    "block": Block,
    "resample@0.1": lambda: Guarded("resample@0.1", Resample(temperature=0.1)),
    "reminder": Reminder,
    "best-of-n": BestOfN,
    "care": CARE,
    "smoothllm": SmoothLLM,
    "resta": Smoothing,
    "random-step": lambda: Guarded("random-step", RandomStep()),
    "tsa-all": lambda: Guarded("tsa-all", TSA(rows="all")),
    "tsa-matrix": lambda: Guarded("tsa-matrix", TSA(step_norm="matrix")),
    "tsa-all-matrix": lambda: Guarded("tsa-all-matrix", TSA(rows="all", step_norm="matrix")),
}
"""Comparators beside the search methods of the registry (``noise``, ``race``, ``resample``, ``tsa``)."""


def known() -> list[str]:
    """All names that :func:`comparators` takes."""
    return [*COMPARATORS, *(name for name in names(METHODS) if name not in COMPARATORS)]


def comparators(chosen: str, variants: Sequence[str] = ()) -> list[Comparator]:
    """Comparators for names with commas between them, in that order, and after them the :func:`variant` of each file.

    Raises:
        ConfigurationError: no name, an unknown one, one that comes twice, or a variant that cannot be read.
    """
    wanted = [name.strip() for name in chosen.split(",") if name.strip()]
    own = [variant(text) for text in variants]
    named = [*wanted, *(one.name for one in own)]
    if not named:
        raise ConfigurationError(f"no method given; known are {', '.join(known())}")
    twice = next((name for name in named if named.count(name) > 1), None)
    if twice:
        raise ConfigurationError(f"the method {twice!r} is given twice")
    if taken := next((one.name for one in own if one.name in known()), None):
        raise ConfigurationError(f"a variant needs a name of its own; {taken!r} is a method's")
    return [*(_comparator(name) for name in wanted), *own]


def _comparator(name: str) -> Comparator:
    if name in COMPARATORS:
        return COMPARATORS[name]()
    if name not in known():
        close = difflib.get_close_matches(name, known(), n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known())}"
        raise ConfigurationError(f"unknown method {name!r}; {hint}")
    return Guarded(name, resolve_method(name))
