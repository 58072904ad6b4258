"""Who is told of an answer while it is made: nobody, or one observer (:mod:`tta_middleware.telemetry`).

A guard tells its observer at few points: an answer begins, text leaves, a moderator is asked, a wave of a repair is
tried, the answer is known. Each of the three that take time is a context manager, so that whatever ends them, an error
or a cancellation, ends them once. Observers hear of everything in the task that does it: what is current there
(``contextvars``) is current in what it starts.

An observer must not raise and must not wait.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Protocol, TypeAlias

from tta_middleware.policy import Policy
from tta_middleware.types import GuardedAnswer, Message, Sampling, StepTrace, Verdict

CheckStage: TypeAlias = Literal["prompt", "output", "repair", "reasoning", "fallback"]
"""What is scored: the user's words, the first answer, a repair's candidates, thoughts, or what a fallback says."""

AnyStage: TypeAlias = CheckStage | Literal["tool_result", "text"]
"""The same, what a tool gave back, or a text of which no more is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What an answer begins with.

    Attributes:
        provider: who answers, as ``gen_ai.provider.name`` has it.
        method: the name of the repair's method.
        sampling: None where another server decides on that.
        stream: text leaves as it is checked, not all of it at the end.
        messages: the conversation. Observers keep it only where the user has asked for that.
    """

    model: str
    moderator: str
    method: str
    sampling: Sampling | None
    stream: bool
    messages: Sequence[Message]
    provider: str = "tta_middleware"


class CheckObserver(Protocol):
    """Hears of one request to a moderator."""

    def scored(self, verdict: Verdict, policy: Policy, end: int | None = None) -> None:
        """A text has its verdict, which ``policy`` decides on; ``end`` is how much of the answer it covers."""
        ...


class WaveObserver(Protocol):
    """Hears of one wave of a repair."""

    def tried(self, step: StepTrace) -> None:
        """The wave is over."""
        ...


class AnswerObserver(Protocol):
    """Hears of one answer."""

    def released(self) -> None:
        """Text leaves."""
        ...

    def checking(self, stage: AnyStage) -> AbstractContextManager[CheckObserver]:
        """A moderator is being asked."""
        ...

    def repairing(self, moves: Sequence[str]) -> AbstractContextManager[WaveObserver]:
        """Candidates are being decoded side by side, each after a kind of move."""
        ...

    def answered(self, answer: GuardedAnswer) -> None:
        """All of the answer is known; its last event is about to leave."""
        ...


class Observer(Protocol):
    """Hears of answers."""

    def answering(self, asked: Asked) -> AbstractContextManager[AnswerObserver]:
        """An answer is being made."""
        ...

    def checking_alone(self, moderator: str, stage: AnyStage) -> AbstractContextManager[CheckObserver]:
        """A moderator is being asked about a text that is part of no answer which is being made."""
        ...


class _Nobody:
    """Hears nothing, at the price of a call."""

    def __enter__(self) -> _Nobody:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None

    def answering(self, asked: Asked) -> _Nobody:
        return self

    def checking(self, stage: AnyStage) -> _Nobody:
        return self

    def checking_alone(self, moderator: str, stage: AnyStage) -> _Nobody:
        return self

    def repairing(self, moves: Sequence[str]) -> _Nobody:
        return self

    def scored(self, verdict: Verdict, policy: Policy, end: int | None = None) -> None:
        return None

    def tried(self, step: StepTrace) -> None:
        return None

    def released(self) -> None:
        return None

    def answered(self, answer: GuardedAnswer) -> None:
        return None


NOBODY = _Nobody()

_everywhere: Observer = NOBODY
_here: ContextVar[Observer | None] = ContextVar("tta_observer", default=None)


def observer() -> Observer:
    """The observer of what runs here: that of this context, else the process's."""
    return _here.get() or _everywhere


@contextmanager
def observed_by(listener: Observer) -> Iterator[None]:
    """``listener`` hears of all that begins inside ``with``, in this context only."""
    token = _here.set(listener)
    try:
        yield
    finally:
        _here.reset(token)


def observe_everywhere(listener: Observer | None) -> Observer:
    """Make ``listener`` the process's observer (None: nobody); returns the one before.

    It is set once, when a program starts; answers under way keep the observer that they began with.
    """
    global _everywhere
    before, _everywhere = _everywhere, listener or NOBODY
    return before
