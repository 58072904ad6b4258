"""Rate limits on our side: requests and tokens per minute, in the order of arrival.

Waiting times are booked, not polled: a call takes its place in the bucket at once and sleeps until its turn. So
the queue is fair, needs no wake-ups, and works across event loops and threads.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext

import anyio
from pydantic import PositiveFloat, PositiveInt

from tta_middleware.aio import process as _process
from tta_middleware.aio.semaphore import SharedSemaphore
from tta_middleware.config import Settings
from tta_middleware.errors import ModerationUnavailableError
from tta_middleware.moderation.wrapper import Wrapper
from tta_middleware.policy.verdicts import verdicts_on
from tta_middleware.protocols import Moderator
from tta_middleware.types import Verdict

_MINUTE = 60.0


class RateLimits(Settings):
    """What one process may send.

    Attributes:
        requests_per_minute: None sets no limit.
        tokens_per_minute: of all texts, estimated by :func:`estimate_tokens`; None sets no limit.
        burst_seconds: how much unused allowance is kept for a burst.
        max_in_flight: requests under way at once; None sets no limit.
    """

    requests_per_minute: PositiveFloat | None = None
    tokens_per_minute: PositiveFloat | None = None
    burst_seconds: PositiveFloat = 5.0
    max_in_flight: PositiveInt | None = None


def estimate_tokens(text: str) -> int:
    """Tokens of ``text``, about: one for each four UTF-8 bytes. The API counts with a tokeniser of its own."""
    return len(text.encode("utf-8", "replace")) // 4 + 1


class TokenBucket:
    """Arithmetic of one limit: a level that refills at ``rate`` per second up to ``capacity``; not thread-safe.

    A booking may take the level below zero; it is then worth the wait until the level would be zero again. Over
    any stretch of ``t`` seconds no more than ``capacity + rate * t`` fall due, cancelled bookings included.
    """

    def __init__(self, rate: float, capacity: float, now: float) -> None:
        self._rate = rate
        self._capacity = capacity
        self._level = capacity
        self._updated = now

    def book(self, cost: float, now: float) -> float:
        """Take ``cost``; the seconds to wait before it is due."""
        self._refill(now)
        self._level -= cost
        return max(0.0, -self._level / self._rate)

    def give_back(self, cost: float, now: float) -> None:
        """Undo a booking that was not used."""
        self._refill(now)
        self._level = min(self._capacity, self._level + cost)

    def _refill(self, now: float) -> None:
        elapsed = max(0.0, now - self._updated)
        self._level = min(self._capacity, self._level + elapsed * self._rate)
        self._updated = max(self._updated, now)


class Limiter:
    """The limits of a process, shared by all its event loops and threads.

    Attributes:
        waiting: calls that have booked and are not yet due.
    """

    def __init__(
        self,
        limits: RateLimits,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self._lock = _process.Lock()
        self._requests = _bucket(limits.requests_per_minute, limits, clock())
        self._tokens = _bucket(limits.tokens_per_minute, limits, clock())
        self._slots = SharedSemaphore(limits.max_in_flight) if limits.max_in_flight else None
        self._paused_until = clock()
        self.waiting = 0
        _process.forget_after_fork(self)

    def after_fork(self) -> None:
        """Whoever waits is in the parent."""
        self.waiting = 0

    @property
    def in_flight(self) -> int:
        """SharedSemaphore that are taken; 0 without ``max_in_flight``."""
        return self._slots.taken if self._slots else 0

    @asynccontextmanager
    async def admit(self, tokens: int) -> AsyncIterator[None]:
        """Wait for the turn of one request of ``tokens`` tokens, and hold its slot.

        Raises:
            ModerationUnavailableError: the turn comes after the caller's deadline; nothing is spent.
        """
        await self._due(tokens)
        sent = False
        try:
            async with self._slots.hold() if self._slots else nullcontext():
                sent = True
                yield
        finally:
            if not sent:
                with self._lock:
                    self._give_back(tokens)

    @contextmanager
    def try_admit(self, tokens: int) -> Iterator[bool]:
        """Whether one more request of ``tokens`` tokens may go without waiting; if so, holds its slot inside ``with``.

        For requests that are not needed: a refused one costs nothing.
        """
        with self._slots.hold_if_free() if self._slots else nullcontext(True) as free:
            yield free and self._spend(tokens)

    def _spend(self, tokens: int) -> bool:
        with self._lock:
            if self._book(tokens) <= 0.0:
                return True
            self._give_back(tokens)
            return False

    def pause(self, seconds: float) -> None:
        """Let nothing new fall due for ``seconds``: the server has asked for it."""
        with self._lock:
            self._paused_until = max(self._paused_until, self._clock() + seconds)

    async def _due(self, tokens: int) -> None:
        with self._lock:
            wait = self._book(tokens)
            self.waiting += wait > 0.0
        if wait <= 0.0:
            return
        due = False
        try:
            if wait > anyio.current_effective_deadline() - anyio.current_time():
                raise ModerationUnavailableError(
                    f"the rate limit's queue is {wait:.1f} s long, longer than the deadline", cause="deadline"
                )
            await self._sleep(wait)
            due = True
        finally:
            with self._lock:
                self.waiting -= 1
                if not due:
                    self._give_back(tokens)

    def _book(self, tokens: int) -> float:
        now = self._clock()
        waits = [self._paused_until - now]
        if self._requests:
            waits.append(self._requests.book(1, now))
        if self._tokens:
            waits.append(self._tokens.book(tokens, now))
        return max(waits)

    def _give_back(self, tokens: int) -> None:
        now = self._clock()
        if self._requests:
            self._requests.give_back(1, now)
        if self._tokens:
            self._tokens.give_back(tokens, now)


class Limited(Wrapper):
    """A moderator whose requests wait for their turn; a 429 that names a pause holds all of them."""

    def __init__(self, inner: Moderator, limiter: Limiter) -> None:
        super().__init__(inner)
        self.limiter = limiter

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        async with self.limiter.admit(sum(map(estimate_tokens, texts))):
            try:
                return await verdicts_on(self._inner, texts, prompt=prompt)
            except ModerationUnavailableError as error:
                if error.cause == "rate_limit" and error.retry_after:
                    self.limiter.pause(error.retry_after)
                raise


def _bucket(per_minute: float | None, limits: RateLimits, now: float) -> TokenBucket | None:
    if per_minute is None:
        return None
    rate = per_minute / _MINUTE
    return TokenBucket(rate, max(1.0, rate * limits.burst_seconds), now)
