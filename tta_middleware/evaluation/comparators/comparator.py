"""What every comparator shares: the bench it works on and the shape it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tta_middleware.config import Budget
from tta_middleware.guard.guard import Guard
from tta_middleware.guard.quality import QualityGate
from tta_middleware.guard.settings import Repair, Report
from tta_middleware.methods.base import Method
from tta_middleware.policy import Policy
from tta_middleware.protocols import Engine, Moderator, Quality
from tta_middleware.types import Message, Sampling, Trace


@dataclass(frozen=True, slots=True)
class Bench:
    """What every method works with: the same engine, oracle, policy, budget and quality gate."""

    engine: Engine
    moderator: Moderator
    policy: Policy = field(default_factory=Policy)
    budget: Budget = field(default_factory=Budget)
    seed: int = 0
    quality: Quality = field(default_factory=QualityGate)

    def guard(self, method: Method | None) -> Guard:
        """A guard that repairs with ``method``, or blocks."""
        repair = Repair(method=method, budget=self.budget, seed=self.seed)
        return Guard(self.engine, self.moderator, policy=self.policy, repair=repair, quality=self.quality)


class Comparator(Protocol):
    """One way to answer a prompt.

    Every comparator begins with the undefended answer and acts only if that is flagged, so that all have the same
    trigger, count that answer's tokens alike, and leave harmless answers alone. Defences that their authors put in
    front of every prompt (SmoothLLM, RESTA, the self-reminder) fare no worse by this: their first answer is paid for,
    but on harmless prompts they can do no harm.
    """

    @property
    def name(self) -> str: ...

    @property
    def settings(self) -> str:
        """Everything that changes results, as text; a run is not resumed under other settings."""
        ...

    def iterations(self, trace: Trace) -> float:
        """How many steps of the method's own loop a trace stands for, as the paper's Table 1 counts them."""
        ...

    async def run(self, bench: Bench, messages: Sequence[Message], sampling: Sampling) -> Report:
        """The undefended and the final answer, both scored and judged for usability; ``final`` None if the same.

        Raises:
            EngineError: the model failed.
            ModerationError: an answer could not be scored.
        """
        ...
