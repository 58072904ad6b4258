"""The methods that an evaluation compares, by name.

Every search method that the registry knows is one. A comparator that is no search (a self-reminder, SmoothLLM) is a
class with :class:`Comparator`'s shape and an entry in :data:`COMPARATORS`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from tta_middleware.config import Budget
from tta_middleware.errors import ConfigurationError
from tta_middleware.guard import Guard, Repair, Report
from tta_middleware.optimise.base import Method
from tta_middleware.policy import Policy
from tta_middleware.protocols import Engine, Moderator
from tta_middleware.registry import METHODS, names, resolve_method
from tta_middleware.types import Message, Sampling


@dataclass(frozen=True, slots=True)
class Bench:
    """What every method works with: the same engine, oracle, policy and budget."""

    engine: Engine
    moderator: Moderator
    policy: Policy = field(default_factory=Policy)
    budget: Budget = field(default_factory=Budget)
    seed: int = 0

    def guard(self, method: Method | None) -> Guard:
        """A guard that repairs with ``method``, or blocks."""
        repair = Repair(method=method, budget=self.budget, seed=self.seed)
        return Guard(self.engine, self.moderator, policy=self.policy, repair=repair)


class Comparator(Protocol):
    """One way to answer a prompt."""

    @property
    def name(self) -> str: ...

    @property
    def settings(self) -> str:
        """Everything that changes results, as text; a run is not resumed under other settings."""
        ...

    async def run(self, bench: Bench, messages: Sequence[Message], sampling: Sampling) -> Report:
        """The undefended and the final answer, both scored and judged for usability; ``final`` None if the same."""
        ...


@dataclass(frozen=True, slots=True)
class Guarded:
    """A guard with one search method; None only measures the model itself."""

    name: str
    method: Method | None

    @property
    def settings(self) -> str:
        return repr(self.method)

    async def run(self, bench: Bench, messages: Sequence[Message], sampling: Sampling) -> Report:
        return await bench.guard(self.method).report(messages, sampling, judge_all=True)


COMPARATORS: Final[Mapping[str, Callable[[], Comparator]]] = {"none": lambda: Guarded("none", None)}
"""Comparators beside the search methods."""


def known() -> list[str]:
    """All names that :func:`comparators` takes."""
    return [*COMPARATORS, *(name for name in names(METHODS) if name not in COMPARATORS)]


def comparators(chosen: str) -> list[Comparator]:
    """Comparators for names with commas between them, in that order.

    Raises:
        ConfigurationError: no name, an unknown one, or one that comes twice.
    """
    wanted = [name.strip() for name in chosen.split(",") if name.strip()]
    if not wanted:
        raise ConfigurationError(f"no method given; known are {', '.join(known())}")
    twice = next((name for name in wanted if wanted.count(name) > 1), None)
    if twice:
        raise ConfigurationError(f"the method {twice!r} is given twice")
    return [_comparator(name) for name in wanted]


def _comparator(name: str) -> Comparator:
    if name in COMPARATORS:
        return COMPARATORS[name]()
    if name not in known():
        close = difflib.get_close_matches(name, known(), n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known())}"
        raise ConfigurationError(f"unknown method {name!r}; {hint}")
    return Guarded(name, resolve_method(name))
