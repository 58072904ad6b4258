"""Circuit breaker: stop asking a server that is down, try it now and then, go on when it answers.

Source: M. Nygard, "Release It!" (2007), states closed, open and half-open.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias
from weakref import WeakSet

from pydantic import Field, PositiveFloat, PositiveInt

from tta_middleware.aio import process as _process
from tta_middleware.config import Settings
from tta_middleware.errors import (
    CircuitOpenError,
    InvalidVerdictError,
    ModerationError,
    ModerationUnavailableError,
)
from tta_middleware.moderation.wrapper import Wrapper
from tta_middleware.policy.verdicts import verdicts_on
from tta_middleware.protocols import Moderator
from tta_middleware.types import Verdict

State: TypeAlias = Literal["closed", "open", "half-open"]
Outcome: TypeAlias = Literal["success", "failure", "unknown"]

_REMEMBERED_TRANSITIONS = 100

# Whoever wants to know the states of all breakers finds them here; nothing is kept alive by it.
_lock = _process.Lock()
_living: WeakSet[WithBreaker] = WeakSet()


class BreakerSettings(Settings):
    """When the breaker opens and how it closes.

    Attributes:
        window: seconds of calls that are looked at.
        minimum_calls: fewer calls in the window say nothing.
        failure_rate: share of failed calls in the window that opens the breaker.
        open_seconds: how long nothing is sent before a call may probe the server.
        probes: probes in a row that must succeed; they go one at a time.
    """

    window: PositiveFloat = 10.0
    minimum_calls: PositiveInt = 20
    failure_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 0.6
    open_seconds: PositiveFloat = 5.0
    probes: PositiveInt = 1


@dataclass(frozen=True, slots=True)
class Transition:
    """A change of state; ``at`` is in seconds of the breaker's clock."""

    at: float
    before: State
    after: State


class CircuitBreaker:
    """The state machine, shared by all event loops and threads of a process.

    :meth:`acquire` before a call, :meth:`record` after it. Calls that began before the last change of state no
    longer count when they end.

    Attributes:
        transitions: the last changes of state, oldest first.
        refused: calls that were not sent because the breaker was open.
    """

    def __init__(self, settings: BreakerSettings | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings or BreakerSettings()
        self._clock = clock
        self._lock = _process.Lock()
        self._state: State = "closed"
        self._calls: deque[tuple[float, bool]] = deque()
        self._failures = 0
        self._opened = 0.0
        self._generation = 0
        self._probing = False
        self._succeeded = 0
        self.transitions: deque[Transition] = deque(maxlen=_REMEMBERED_TRANSITIONS)
        self.refused = 0
        _process.forget_after_fork(self)

    def after_fork(self) -> None:
        """A probe under way is the parent's, and what comes of it is not told here."""
        self._probing = False

    @property
    def state(self) -> State:
        """``open`` until a probe is sent, even when its time has come."""
        return self._state

    def acquire(self) -> int:
        """A permit for one call.

        Raises:
            CircuitOpenError: nothing may be sent now; ``retry_after`` says when.
        """
        with self._lock:
            now = self._clock()
            if self._state == "open" and now - self._opened >= self._settings.open_seconds:
                self._move("half-open", now)
            if self._state == "closed":
                return self._generation
            if self._state == "half-open" and not self._probing:
                self._probing = True
                return self._generation
            self.refused += 1
            wait = max(0.0, self._settings.open_seconds - (now - self._opened))
        raise CircuitOpenError(
            f"the moderation server is failing and is left alone; the next try is due in {wait:.1f} s",
            cause="circuit_open",
            retry_after=wait,
        )

    def record(self, permit: int, outcome: Outcome) -> None:
        """How the call with ``permit`` ended; ``unknown`` for a cancelled one."""
        with self._lock:
            if permit != self._generation:
                return
            now = self._clock()
            if self._state == "half-open":
                self._record_probe(outcome, now)
            elif outcome != "unknown":
                self._record_call(outcome == "failure", now)

    def _record_probe(self, outcome: Outcome, now: float) -> None:
        self._probing = False
        if outcome == "failure":
            self._move("open", now)
        elif outcome == "success":
            self._succeeded += 1
            if self._succeeded >= self._settings.probes:
                self._move("closed", now)

    def _record_call(self, failed: bool, now: float) -> None:
        self._calls.append((now, failed))
        self._failures += failed
        while self._calls[0][0] <= now - self._settings.window:
            self._failures -= self._calls.popleft()[1]
        enough = len(self._calls) >= self._settings.minimum_calls
        if enough and self._failures >= self._settings.failure_rate * len(self._calls):
            self._move("open", now)

    def _move(self, after: State, now: float) -> None:
        self.transitions.append(Transition(now, self._state, after))
        self._state = after
        self._generation += 1
        self._calls.clear()
        self._failures = self._succeeded = 0
        self._probing = False
        if after == "open":
            self._opened = now


class WithBreaker(Wrapper):
    """A moderator behind a circuit breaker.

    Failures are what :class:`ModerationUnavailableError` and :class:`InvalidVerdictError` stand for, except 429
    and spent deadlines. A server that refuses a request, by 429 or another 4xx, is alive.
    """

    def __init__(self, inner: Moderator, breaker: CircuitBreaker) -> None:
        super().__init__(inner)
        self.breaker = breaker
        with _lock:
            _living.add(self)

    @staticmethod
    def living() -> list[WithBreaker]:
        """Those of this process that are in use."""
        with _lock:
            return list(_living)

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        """As the inner moderator; raises :class:`CircuitOpenError` while the breaker is open."""
        permit = self.breaker.acquire()
        outcome: Outcome = "unknown"
        try:
            verdicts = await verdicts_on(self._inner, texts, prompt=prompt)
            outcome = "success"
        except ModerationError as error:
            outcome = _outcome(error)
            raise
        finally:
            self.breaker.record(permit, outcome)
        return verdicts


def _outcome(error: ModerationError) -> Outcome:
    if isinstance(error, InvalidVerdictError):
        return "failure"
    if not isinstance(error, ModerationUnavailableError):
        return "success"
    known: dict[str, Outcome] = {"rate_limit": "success", "deadline": "unknown"}
    return known.get(error.cause, "failure")
