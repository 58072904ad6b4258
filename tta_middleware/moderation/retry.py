"""The one retry policy: bounded attempts and elapsed time, full jitter, the server's wishes honoured.

Source of the backoff: M. Brooker, "Exponential Backoff And Jitter" (2015), the "full jitter" variant.
"""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import anyio
import tenacity
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

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

T = TypeVar("T")


class RetryPolicy(Settings):
    """When to try again.

    Attributes:
        attempts: requests at most, the first one included.
        max_elapsed: seconds from the first request to the last answer.
        base_delay: seconds; the n-th wait is drawn from [0, min(max_delay, base_delay * 2**(n-1))].
        max_delay: seconds; no drawn wait is longer.
        max_retry_after: seconds; a server that asks for a longer pause is not asked again.
        invalid_answers: also try again after an unusable answer, such as a proxy's page with status 200. Off by
            default: a server that speaks another dialect would be asked in vain each time.
    """

    attempts: PositiveInt = 5
    max_elapsed: PositiveFloat = 30.0
    base_delay: NonNegativeFloat = 0.25
    max_delay: NonNegativeFloat = 8.0
    max_retry_after: NonNegativeFloat = 20.0
    invalid_answers: bool = False


def is_retryable(error: BaseException, policy: RetryPolicy) -> bool:
    """Only timeouts, connection errors, 408, 409, 429 and 5xx; an open breaker or a spent deadline is final."""
    if isinstance(error, InvalidVerdictError):
        return policy.invalid_answers
    if not isinstance(error, ModerationUnavailableError) or isinstance(error, CircuitOpenError):
        return False
    return error.cause != "deadline"


def delay(policy: RetryPolicy, attempt: int, asked: float | None, rng: random.Random) -> float | None:
    """Seconds to wait after the failed ``attempt`` (1 is the first); None says to give up.

    ``asked`` is the server's Retry-After in seconds; the wait is never shorter than that.
    """
    if attempt >= policy.attempts or (asked is not None and asked > policy.max_retry_after):
        return None
    # 2**64 is far above any cap; a larger exponent would overflow a float.
    ceiling = min(policy.max_delay, policy.base_delay * 2.0 ** min(attempt - 1, 64))
    drawn = min(policy.max_delay, rng.uniform(0.0, ceiling))
    return drawn if asked is None else max(asked, drawn)


class Retrier:
    """Repeats failed calls under a :class:`RetryPolicy`; holds no state of a call.

    A wait that would outlast ``max_elapsed`` or the caller's own deadline (the surrounding anyio cancel scope) is
    not begun: the last error is raised at once, with what was tried.
    """

    def __init__(
        self,
        policy: RetryPolicy | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
        rng: random.Random | None = None,
    ) -> None:
        self._policy = policy or RetryPolicy()
        self._clock = clock
        self._sleep = sleep
        # Jitter needs no secrecy, only spread.
        self._rng = rng or random.Random()  # noqa: S311

    async def call(self, request: Callable[[], Awaitable[T]]) -> T:
        """Await ``request()`` until it succeeds, fails for good, or the policy ends.

        Raises:
            ModerationUnavailableError: the policy ended; the message tells attempts and seconds.
        """
        run = _Run(self._policy, self._clock, self._rng)
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(lambda error: is_retryable(error, self._policy)),
            wait=run.wait,
            stop=run.stop,
            sleep=self._sleep,
            retry_error_callback=run.give_up,
        )

        async def attempt() -> T:
            run.attempts += 1
            return await request()

        with anyio.move_on_after(self._policy.max_elapsed):
            result: T = await retrying(attempt)
            return result
        raise run.out_of_time()


class Retrying(Wrapper):
    """A moderator whose failed calls are repeated."""

    def __init__(self, inner: Moderator, retrier: Retrier | None = None) -> None:
        super().__init__(inner)
        self._retrier = retrier or Retrier()

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        return await self._retrier.call(lambda: verdicts_on(self._inner, texts, prompt=prompt))


class _Run:
    """One call's way through the policy."""

    def __init__(self, policy: RetryPolicy, clock: Callable[[], float], rng: random.Random) -> None:
        self._policy = policy
        self._clock = clock
        self._rng = rng
        self._started = clock()
        self._delay: float | None = 0.0
        self.attempts = 0

    def wait(self, state: tenacity.RetryCallState) -> float:
        asked = getattr(_failure(state), "retry_after", None)
        self._delay = delay(self._policy, state.attempt_number, asked, self._rng)
        return self._delay or 0.0

    def stop(self, state: tenacity.RetryCallState) -> bool:
        return self._delay is None or self._delay > self._seconds_left()

    def give_up(self, state: tenacity.RetryCallState) -> None:
        failure = _failure(state)
        if self.attempts == 1:
            raise failure
        why = f"gave up after {self.attempts} attempts in {self._clock() - self._started:.1f} s"
        if isinstance(failure, ModerationUnavailableError):
            raise ModerationUnavailableError(f"{failure}; {why}", cause=failure.cause, retry_after=failure.retry_after)
        raise type(failure)(f"{failure}; {why}")

    def out_of_time(self) -> ModerationUnavailableError:
        limit = self._policy.max_elapsed
        return ModerationUnavailableError(f"no verdict after {self.attempts} attempts in {limit} s", cause="timeout")

    def _seconds_left(self) -> float:
        caller = anyio.current_effective_deadline() - anyio.current_time()
        return min(self._policy.max_elapsed - (self._clock() - self._started), caller)


def _failure(state: tenacity.RetryCallState) -> ModerationError:
    error = state.outcome.exception() if state.outcome else None
    return error if isinstance(error, ModerationError) else ModerationUnavailableError("no answer")
