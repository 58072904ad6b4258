"""From settings to a guard: what commands, jobs and servers work with, whatever read their settings.

Names stand for parts here; what a name means is in :mod:`tta_middleware.registry`. Nothing here knows a command line.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import anyio

from tta_middleware.config import Budget
from tta_middleware.guard.guard import Guard, Repair
from tta_middleware.policy import Policy
from tta_middleware.profiles.store import quality_for
from tta_middleware.protocols import Engine, Moderator
from tta_middleware.registry import resolve_engine, resolve_method, resolve_moderator
from tta_middleware.types import GuardedAnswer, Message, Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """Which model is loaded, and how.

    Attributes:
        model: a reference as :func:`~tta_middleware.registry.resolve_engine` reads it.
        device: where it runs; ``auto`` leaves it to the engine, as with ``dtype``.
        max_batch: sequences decoded side by side at most; None leaves it to the engine.
        allow_download: whether a Hugging Face id may be fetched.
    """

    model: str = "smollm2"
    device: str = "auto"
    dtype: str = "auto"
    max_batch: int | None = None
    allow_download: bool = False

    @property
    def hardware(self) -> dict[str, Any]:
        """Those settings that may change an answer's wording, where they were given."""
        asked = {"device": self.device, "dtype": self.dtype, "max_batch": self.max_batch}
        return {name: value for name, value in asked.items() if value not in ("auto", None)}

    @property
    def settings(self) -> dict[str, Any]:
        """For the engine: only what was given, since other engines than ours need not know every setting."""
        return self.hardware | ({"allow_download": True} if self.allow_download else {})

    def engine(self) -> Engine:
        """The engine by name; nothing is loaded yet.

        Raises:
            ConfigurationError: the engine has no such setting, or refuses it.
        """
        return resolve_engine(self.model, **self.settings)


Loaded: TypeAlias = Callable[[Loading, float], None]
"""Told what was loaded, and in how many seconds."""


def _untold(_loading: Loading, _seconds: float) -> None:
    """Nobody wants to know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answering(Loading):
    """How answers are made; small and picklable, so that it can be sent to where they are made.

    Attributes:
        moderator: the name of who scores answers.
        method: the name of how flagged ones are repaired; ``none`` blocks them.
        sampling: of answers whose request says nothing else; its seed is the repairs', too.
    """

    moderator: str
    method: str
    policy: Policy
    sampling: Sampling
    budget: Budget

    @asynccontextmanager
    async def guard(self, *, loaded: Loaded = _untold) -> AsyncIterator[Guard]:
        """A guard whose parts are closed afterwards, in the loop that used them."""
        async with opened(self, self.moderator, loaded=loaded) as (engine, moderator):
            yield self.guard_over(engine, moderator)

    def guard_over(self, engine: Engine, moderator: Moderator) -> Guard:
        """A guard over parts that somebody else closes."""
        repair = Repair(method=resolve_method(self.method), budget=self.budget, seed=self.sampling.seed)
        return Guard(engine, moderator, policy=self.policy, repair=repair, quality=quality_for(self.model))

    async def answer(self, messages: Sequence[Message], *, loaded: Loaded = _untold) -> GuardedAnswer:
        """One answer, with parts of its own."""
        async with self.guard(loaded=loaded) as guard:
            return await guard.answer(messages, self.sampling)


@asynccontextmanager
async def opened(
    loading: Loading, moderator: str, *, loaded: Loaded = _untold
) -> AsyncIterator[tuple[Engine, Moderator]]:
    """Engine and moderator by name; the model is loaded, so that its mistakes show before any work.

    ``loaded`` is told what that took, since it counts in no answer's time.
    """
    scorer = resolve_moderator(moderator)
    engine = loading.engine()
    try:
        begun = time.monotonic()
        await engine.load()
        loaded(loading, time.monotonic() - begun)
        yield engine, scorer
    finally:
        with anyio.CancelScope(shield=True):
            await scorer.aclose()
            await engine.aclose()
