"""The layers of a stack while callers are cancelled and calls fail: nobody loses a verdict, nothing is kept."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import Sequence
from typing import Any

import anyio
import pytest

from tta_middleware.errors import (
    InvalidVerdictError,
    ModerationError,
    ModerationRejectedError,
    ModerationUnavailableError,
)
from tta_middleware.moderation.breaker import BreakerSettings, CircuitBreaker, WithBreaker
from tta_middleware.moderation.cache import Cached, CacheSettings, VerdictCache
from tta_middleware.moderation.coalesce import Coalescing, CoalescingSettings
from tta_middleware.moderation.hedge import Hedged, HedgeSettings
from tta_middleware.moderation.limits import Limited, Limiter, RateLimits
from tta_middleware.moderation.retry import Retrier, Retrying, RetryPolicy
from tta_middleware.moderation.wrapper import Closing
from tta_middleware.policy.verdicts import verdicts_on
from tta_middleware.testing.virtual_time import now, run_in_virtual_time
from tta_middleware.types import Verdict

CALLERS = 60


class Fickle(Closing):
    """Scores a text by the number it ends with; takes its time, also to be cancelled, and fails in every way."""

    name, default_threshold, categories = "fickle", 0.5, ("harm",)

    def __init__(self, rng: random.Random) -> None:
        self._rng, self._fails = rng, rng.choice([0.0, 0.1, 0.4])
        self.in_flight = self.most = 0

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        try:
            await anyio.sleep(self._rng.choice([0, 0.01, 0.05, 0.5, 3]))
        except asyncio.CancelledError:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(self._rng.choice([0, 0.02, 0.2]))
            raise
        finally:
            self.in_flight -= 1
        if self._rng.random() < self._fails:
            failures: list[BaseException | None] = [
                ModerationUnavailableError("down", cause="status"),
                ModerationUnavailableError("slow down", cause="rate_limit", retry_after=0.3),
                InvalidVerdictError("html"),
                ModerationRejectedError("too long", status=400),
                asyncio.CancelledError(),
                None,
            ]
            if (failure := self._rng.choice(failures)) is not None:
                raise failure
            return []
        return [Verdict({"harm": float(text.split()[1])}, flagged=False, model=self.name) for text in texts]


async def under_fire(seed: int) -> None:
    rng = random.Random(seed)
    inner = Fickle(rng)
    most, rate = rng.choice([None, 1, 3]), rng.choice([None, 600, 6000])
    limiter = Limiter(RateLimits(max_in_flight=most, requests_per_minute=rate), clock=now)
    breaker = CircuitBreaker(BreakerSettings(minimum_calls=5, open_seconds=0.5), clock=now)
    hedge = Hedged(inner, HedgeSettings(minimum_samples=3), admit=lambda _: limiter.try_admit(1), clock=now)
    retrier = Retrier(RetryPolicy(attempts=3, max_elapsed=10, base_delay=0.05), clock=now, rng=rng)
    behind: Any = WithBreaker(Limited(hedge, limiter), breaker) if rng.random() < 0.5 else Limited(hedge, limiter)
    gathered = Coalescing(Retrying(behind, retrier), CoalescingSettings(max_texts=4), reads_prompt=False)
    stack = Cached(gathered, VerdictCache(CacheSettings(ttl=2.0), clock=now), reads_prompt=False)
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))

    async def call() -> None:
        texts = [f"text {rng.randrange(12) / 20}" for _ in range(rng.randrange(1, 6))]
        with anyio.move_on_after(rng.choice([0.002, 0.05, 0.6, 50, 50, 50])):
            try:
                found = await verdicts_on(stack, texts)
            except ModerationError:
                return
            assert [verdict.scores["harm"] for verdict in found] == [float(text.split()[1]) for text in texts]

    calls: list[asyncio.Task[None]] = []
    cancelled = set[asyncio.Task[None]]()
    for _ in range(CALLERS):
        calls.append(asyncio.create_task(call()))
        if rng.random() < 0.5:
            await anyio.sleep(rng.choice([0, 0.001, 0.02, 0.2]))
        if rng.random() < 0.3:
            leaving = rng.choice(calls)
            if leaving.cancel():
                cancelled.add(leaving)
            if rng.random() < 0.2:
                asyncio.get_running_loop().call_soon(leaving.cancel)
    _, waiting = await asyncio.wait(calls, timeout=200)
    assert not waiting
    for one in calls:
        assert one.cancelled() == (one in cancelled)
        assert one.cancelled() or one.exception() is None
    await anyio.sleep(30)
    assert (inner.in_flight, limiter.in_flight, limiter.waiting) == (0, 0, 0)
    assert most is None or inner.most <= most
    assert not any([*stack._flights.values(), *gathered._open.values()])
    calls.clear()
    cancelled.clear()
    gc.collect()
    assert told == []
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("seed", range(3))
def test_nobody_loses_a_verdict_and_nothing_is_held(seed: int) -> None:
    run_in_virtual_time(under_fire(seed))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 100))
def test_nobody_loses_a_verdict_and_nothing_is_held_at_length(seed: int) -> None:
    run_in_virtual_time(under_fire(seed))
