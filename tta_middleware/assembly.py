"""From settings to a guard: what commands, jobs and servers work with, whatever read their settings.

Names stand for parts here; what a name means is in :mod:`tta_middleware.registry`. Nothing here knows a command line.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Hashable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import anyio

from tta_middleware.aio import process as _process
from tta_middleware.aio.streams import close_all
from tta_middleware.call_text import json_reading
from tta_middleware.config import Budget, Reasoning, Windows
from tta_middleware.guard import Fallback, Guard, PromptCheck, Repair
from tta_middleware.guard.holdback import Reading
from tta_middleware.guard.quality import QualityGate
from tta_middleware.guard.settings import BRIDGES
from tta_middleware.methods.base import Method
from tta_middleware.policy import Policy, StagePolicies
from tta_middleware.policy.verdicts import load
from tta_middleware.profiles.fingerprint import model_hash
from tta_middleware.profiles.store import judge_calibration, quality_for
from tta_middleware.protocols import Engine, Moderator, Quality
from tta_middleware.registry import (
    asks_own,
    check_moderator,
    check_policies,
    resolve_engine,
    resolve_method,
    resolve_moderator,
)
from tta_middleware.types import GuardedAnswer, Message, Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """Which model is loaded, and how.

    Attributes:
        model: a reference as :func:`~tta_middleware.registry.resolve_engine` reads it.
        device: where it runs; ``auto`` leaves it to the engine, as with ``dtype``.
        max_batch: sequences decoded side by side at most; None leaves it to the engine.
        allow_download: whether a Hugging Face id may be fetched.
        engine_options: further settings of the engine, by name.
    """

    model: str = "smollm2"
    device: str = "auto"
    dtype: str = "auto"
    max_batch: int | None = None
    allow_download: bool = False
    engine_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def hardware(self) -> dict[str, Any]:
        """Those settings that may change an answer's wording, where they were given."""
        asked = {"device": self.device, "dtype": self.dtype, "max_batch": self.max_batch}
        return {name: value for name, value in asked.items() if value not in ("auto", None)} | dict(self.engine_options)

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
class AnswerSettings(Loading):
    """How answers are made; small and picklable, so that it can be sent to where they are made.

    Attributes:
        moderator: the name of who scores answers.
        method: the name of how flagged ones are repaired; ``none`` blocks them.
        sampling: of answers whose request says nothing else; its seed is the repairs', too.
        reasoning: how a model that thinks is let think, and what becomes of its thoughts.
        prompt_check: whether the prompt is moderated, too.

    Raises:
        ConfigurationError: there is no such method or moderator, or the moderator does not score what the policy
            enforces. Whether there is such a model shows when it is loaded.
    """

    moderator: str
    method: str
    policy: Policy
    sampling: Sampling
    budget: Budget
    reasoning: Reasoning = field(default_factory=Reasoning)
    prompt_check: PromptCheck = "off"

    def __post_init__(self) -> None:
        resolve_method(self.method)
        check_moderator(self.moderator, self.model)
        check_policies(self.moderator, StagePolicies.of(self.policy))

    @asynccontextmanager
    async def guard(self, *, loaded: Loaded = _untold) -> AsyncIterator[Guard]:
        """A guard whose parts are closed afterwards, in the loop that used them."""
        async with opened(self, self.moderator, loaded=loaded) as (engine, moderator):
            yield self.guard_over(engine, moderator)

    def guard_over(self, engine: Engine, moderator: Moderator) -> Guard:
        """A guard over parts that somebody else closes."""
        repair = Repair(method=resolve_method(self.method), budget=self.budget, seed=self.sampling.seed)
        return Guard(
            engine,
            moderator,
            policy=self.policy,
            repair=repair,
            quality=quality_for(self.model),
            reasoning=self.reasoning,
            prompt_check=self.prompt_check,
        )

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
    engine = loading.engine()
    scorer = resolve_moderator(moderator, engine=engine, calibration=judge_calibration)
    try:
        begun = time.monotonic()
        await load(scorer)
        await engine.load()
        loaded(loading, time.monotonic() - begun)
        yield engine, scorer
    finally:
        with anyio.CancelScope(shield=True):
            await close_all((scorer, engine))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GuardSettings:
    """What one call asks of its guard: checked, and parts by name or as they were given.

    Attributes:
        loading: options of an engine that is asked for by name.
        policy: of every stage; thresholds that it leaves open are the moderator's.
        judged: makes what judges candidates of the model's quality gate, which judges them itself without.
        reading: what consumers make of an answer; see :class:`~tta_middleware.guard.guard.Guard`.
        reasoning: how a model that thinks is let think, and what becomes of its thoughts.
    """

    model: str | Engine
    moderator: str | Moderator
    method: str | Method | None
    policy: StagePolicies
    budget: Budget
    seed: int
    loading: Mapping[str, Any] = field(default_factory=dict)
    fallback: Fallback = "refuse"
    bridges: tuple[str, ...] = BRIDGES
    windows: Windows = field(default_factory=Windows)
    prompt_check: PromptCheck = "off"
    judged: Callable[[Quality], Quality] | None = None
    reading: Reading = json_reading
    reasoning: Reasoning = field(default_factory=Reasoning)

    def repair(self, method: Method | None) -> Repair:
        """How a flagged answer is repaired, by the method that ``method`` of these settings is."""
        return Repair(method=method, budget=self.budget, fallback=self.fallback, seed=self.seed, bridges=self.bridges)


class Runtime:
    """Engines, moderators and methods by what they were asked for, each made once.

    LangChain's ``configurable_fields`` builds a new chat model per call. It hands the fields on, so a model that is
    held in this shared field is loaded once, while one in a private attribute would be loaded with every call. Copies,
    deep ones too, are this very object; what is pickled is an empty one, which loads where it is opened.
    """

    def __copy__(self) -> Runtime:
        return self

    def __deepcopy__(self, memo: Any) -> Runtime:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Runtime, ()

    def __init__(self) -> None:
        self._lock = _process.Lock()
        self._engines: dict[Hashable, Engine] = {}
        # A moderator that is an engine's holds that engine, so no other one gets its id.
        self._moderators: dict[tuple[str, int], Moderator] = {}
        self._methods: dict[str, Method | None] = {}
        self._gates: dict[str, QualityGate] = {}
        self._hashes: dict[str, str] = {}

    def engine(self, model: str | Engine, **options: Any) -> Engine:
        """The engine of ``model``; nothing is loaded yet."""
        if not isinstance(model, str):
            return resolve_engine(model)
        key = (model, *sorted((name, repr(value)) for name, value in options.items()))
        with self._lock:
            if key not in self._engines:
                self._engines[key] = resolve_engine(model, **options)
            return self._engines[key]

    def moderator(self, moderator: str | Moderator, engine: Engine | None = None) -> Moderator:
        """The moderator of that name, or the object itself; one that is named ``self`` is ``engine``, which answers."""
        if not isinstance(moderator, str):
            return resolve_moderator(moderator)
        key = (moderator, id(engine) if asks_own(moderator) else 0)
        with self._lock:
            if key not in self._moderators:
                self._moderators[key] = resolve_moderator(moderator, engine=engine, calibration=judge_calibration)
            return self._moderators[key]

    def method(self, method: str | Method | None) -> Method | None:
        """The method of that name, or the object itself; names are looked up once, not with every answer."""
        if not isinstance(method, str):
            return resolve_method(method)
        with self._lock:
            if method not in self._methods:
                self._methods[method] = resolve_method(method)
            return self._methods[method]

    def gate(self, model: str | Engine) -> QualityGate:
        """The quality gate with the bounds of the model's profile; read once."""
        reference = _reference(model)
        with self._lock:
            if reference not in self._gates:
                self._gates[reference] = quality_for(reference)
            return self._gates[reference]

    def hash(self, model: str | Engine) -> str:
        """What identifies the model's weights; read once."""
        reference = _reference(model)
        with self._lock:
            if reference not in self._hashes:
                self._hashes[reference] = model_hash(reference)
            return self._hashes[reference]

    def guard_for(self, settings: GuardSettings) -> Guard:
        """The guard of one call: parts are made once, the guard around them every time."""
        gate = self.gate(settings.model)
        engine = self.engine(settings.model, **settings.loading)
        return Guard(
            engine,
            self.moderator(settings.moderator, engine),
            policy=settings.policy,
            repair=settings.repair(self.method(settings.method)),
            quality=settings.judged(gate) if settings.judged else gate,
            windows=settings.windows,
            prompt_check=settings.prompt_check,
            reading=settings.reading,
            reasoning=settings.reasoning,
        )

    async def aclose(self) -> None:
        """Close what was made here; objects that the user passed in stay open."""
        with self._lock:
            made: list[Engine | Moderator] = [*self._engines.values(), *self._moderators.values()]
            self._engines.clear()
            self._moderators.clear()
        await close_all(made)


def _reference(model: str | Engine) -> str:
    return model if isinstance(model, str) else model.model_id
