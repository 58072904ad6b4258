"""What a guard's stream tells of, in the order in which it happens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from tta_middleware.types import Channel, GuardedAnswer, Outcome, StepTrace


@dataclass(frozen=True, slots=True)
class Released:
    """The next piece of a streaming answer, or of thoughts that are shown before it, checked."""

    text: str
    channel: Channel = "answer"


@dataclass(frozen=True, slots=True)
class RepairStarted:
    """The answer was flagged and a search begins; ``seam`` characters have left and stay."""

    score: float
    category: str
    seam: int


@dataclass(frozen=True, slots=True)
class RepairStep:
    """One wave of the search is over."""

    step: StepTrace


@dataclass(frozen=True, slots=True)
class RepairFinished:
    """The search is over; ``outcome`` and ``stop_reason`` as in :class:`Trace`."""

    outcome: Outcome
    stop_reason: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a stream; ``answer.text`` and ``answer.reasoning`` are all that was released."""

    answer: GuardedAnswer


StreamEvent: TypeAlias = Released | RepairStarted | RepairStep | RepairFinished | Finished
