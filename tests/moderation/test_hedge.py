"""Hedged requests; events decide who is slow, not the clock."""

import asyncio
from contextlib import AbstractContextManager, nullcontext

import anyio
import pytest

from tta_middleware.errors import ModerationUnavailableError
from tta_middleware.moderation.hedge import Hedged, HedgeSettings, Latencies
from tta_middleware.moderation.limits import Limited, Limiter, RateLimits
from tta_middleware.testing.scripted_moderator import ScriptedModerator

EARLY = HedgeSettings(minimum_samples=1)
DOWN = ModerationUnavailableError("down", cause="status")


async def warmed(inner: ScriptedModerator, **options) -> Hedged:
    """Knows one latency of 0 seconds, so it hedges whatever does not answer at once."""
    moderator = Hedged(inner, EARLY, clock=lambda: 0.0, **options)
    await moderator.moderate(["warm"])
    inner.calls.clear()
    return moderator


def gates(*waits):
    rest = iter([anyio.lowlevel.checkpoint, *waits])
    return lambda: next(rest)()


async def test_a_slow_request_is_sent_again_and_the_first_answer_counts():
    inner = ScriptedModerator(gate=gates(anyio.sleep_forever, anyio.lowlevel.checkpoint))
    moderator = await warmed(inner)
    assert (await moderator.moderate(["flagme"]))[0].flagged
    assert inner.calls == [["flagme"], ["flagme"]]
    assert inner.in_flight == 0


async def test_the_first_request_may_still_win():
    second_sent = anyio.Event()

    async def second() -> None:
        second_sent.set()
        await anyio.sleep_forever()

    inner = ScriptedModerator(gate=gates(second_sent.wait, second))
    moderator = await warmed(inner)
    assert (await moderator.moderate(["flagme"]))[0].flagged
    assert inner.in_flight == 0


async def test_an_early_error_is_raised_without_a_second_request():
    inner = ScriptedModerator(failures=[None, DOWN])
    moderator = Hedged(inner, EARLY, clock=iter([0.0, 60.0]).__next__)
    await moderator.moderate(["warm"])
    moderator._clock = lambda: 0.0
    with pytest.raises(ModerationUnavailableError):
        await moderator.moderate(["x"])
    assert inner.calls == [["warm"], ["x"]]


async def test_one_failed_request_leaves_the_other_its_chance():
    second_failed = anyio.Event()

    async def second() -> None:
        second_failed.set()

    async def first() -> None:
        await second_failed.wait()
        # The second request's error is raised meanwhile.
        for _ in range(10):
            await anyio.lowlevel.checkpoint()

    inner = ScriptedModerator(failures=[None, None, DOWN], gate=gates(first, second))
    moderator = await warmed(inner)
    assert len(await moderator.moderate(["x"])) == 1
    assert len(inner.calls) == 2


async def test_the_error_comes_when_both_have_failed():
    second_failed = anyio.Event()

    async def second() -> None:
        second_failed.set()

    inner = ScriptedModerator(failures=[None, DOWN, DOWN], gate=gates(second_failed.wait, second))
    moderator = await warmed(inner)
    with pytest.raises(ModerationUnavailableError):
        await moderator.moderate(["x"])
    assert len(inner.calls) == 2


async def test_no_hedge_where_the_limits_leave_no_room():
    slow = anyio.Event()
    inner = ScriptedModerator(gate=gates(slow.wait))
    asked = []

    def full(texts) -> AbstractContextManager[bool]:
        asked.append(texts)
        slow.set()
        return nullcontext(False)

    moderator = await warmed(inner, admit=full)
    await moderator.moderate(["x"])
    assert (inner.calls, asked) == ([["x"]], [["x"]])


async def test_a_hedge_takes_one_of_the_slots_in_flight_and_gives_it_back():
    answered = anyio.Event()
    inner = ScriptedModerator(gate=gates(anyio.sleep_forever, anyio.sleep_forever, answered.wait, anyio.sleep_forever))
    limiter = Limiter(RateLimits(max_in_flight=3))
    moderator = Limited(await warmed(inner, admit=lambda _texts: limiter.try_admit(1)), limiter)
    calls = [asyncio.create_task(moderator.moderate([text])) for text in ("a", "b")]
    while len(inner.calls) < 3:
        await anyio.lowlevel.checkpoint()
    for _ in range(10):
        await anyio.lowlevel.checkpoint()
    assert (len(inner.calls), inner.in_flight, limiter.in_flight) == (3, 3, 3)
    answered.set()
    done, rest = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
    assert (len(done), inner.in_flight, limiter.in_flight) == (1, 1, 1)
    rest.pop().cancel()
    await asyncio.wait(calls)
    assert limiter.in_flight == 0


async def test_no_hedge_before_enough_is_known():
    slow = anyio.Event()
    inner = ScriptedModerator(gate=slow.wait)
    moderator = Hedged(inner, HedgeSettings(minimum_samples=20))
    call = asyncio.create_task(moderator.moderate(["x"]))
    while not inner.calls:
        await anyio.lowlevel.checkpoint()
    slow.set()
    await call
    assert len(inner.calls) == 1


async def test_cancelling_ends_both_requests():
    both = anyio.Event()

    async def second() -> None:
        both.set()
        await anyio.sleep_forever()

    inner = ScriptedModerator(gate=gates(anyio.sleep_forever, second))
    moderator = await warmed(inner)
    call = asyncio.create_task(moderator.moderate(["x"]))
    await both.wait()
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert inner.in_flight == 0


def test_the_delay_is_the_quantile_of_the_last_latencies():
    latencies = Latencies(HedgeSettings(quantile=0.95, samples=100, minimum_samples=100))
    for milliseconds in range(1, 100):
        latencies.add(milliseconds / 1000)
    assert latencies.delay() is None
    latencies.add(0.1)
    assert latencies.delay() == pytest.approx(0.096)
    for _ in range(100):
        latencies.add(5.0)
    assert latencies.delay() == 5.0
