"""Rate limits without waiting: the sleeper moves the clock."""

import asyncio

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tta_middleware.aio.semaphore import SharedSemaphore
from tta_middleware.errors import ModerationUnavailableError
from tta_middleware.moderation.limits import Limited, Limiter, RateLimits, TokenBucket, estimate_tokens
from tta_middleware.testing.scripted_moderator import ScriptedModerator
from tta_middleware.testing.virtual_time import ManualClock

bookings = st.lists(
    st.tuples(st.floats(0.1, 20.0), st.floats(0.0, 5.0), st.integers(0, 2**30)), min_size=1, max_size=60
)


@given(bookings, st.floats(0.5, 10.0), st.floats(1.0, 20.0), st.booleans())
def test_no_stretch_of_time_sees_more_than_the_limit(steps, rate, capacity, cancelling):
    bucket = TokenBucket(rate, capacity, 0.0)
    now = 0.0
    due: list[tuple[float, float]] = []
    for cost, passed, draw in steps:
        now += passed
        waiting = [entry for entry in due if entry[0] > now]
        if cancelling and waiting and draw % 3 == 0:
            entry = waiting[draw % len(waiting)]
            due.remove(entry)
            bucket.give_back(entry[1], now)
        due.append((now + bucket.book(cost, now), cost))
    for moment, _ in due:
        spent = sum(cost for at, cost in due if at <= moment)
        assert spent <= capacity + rate * moment + 1e-6 * (1.0 + spent)


@given(st.lists(st.floats(0.1, 20.0), min_size=2, max_size=40))
def test_the_queue_keeps_the_order_of_arrival(costs):
    bucket = TokenBucket(1.0, 5.0, 0.0)
    waits = [bucket.book(cost, 0.0) for cost in costs]
    assert waits == sorted(waits)


async def test_requests_above_the_rate_wait_their_turn():
    time = ManualClock()
    limits = RateLimits(requests_per_minute=60, burst_seconds=2.0)
    moderator = Limited(ScriptedModerator(), Limiter(limits, clock=time, sleep=time.sleep))
    for _ in range(5):
        await moderator.moderate(["x"])
    assert time.slept == pytest.approx([1.0, 1.0, 1.0])


async def test_tokens_count_too():
    time = ManualClock()
    limits = RateLimits(tokens_per_minute=600, burst_seconds=1.0)
    moderator = Limited(ScriptedModerator(), Limiter(limits, clock=time, sleep=time.sleep))
    await moderator.moderate(["x" * 396])
    await moderator.moderate(["y"])
    assert time.slept == pytest.approx([9.0, 0.1])


def test_tokens_are_estimated_from_bytes():
    assert estimate_tokens("") == 1
    assert estimate_tokens("a" * 400) == 101
    assert estimate_tokens("\u4f60" * 400) == 301
    assert estimate_tokens("\ud800") >= 1


async def test_a_429_with_a_pause_holds_everybody():
    time = ManualClock()
    refused = ModerationUnavailableError("429", cause="rate_limit", retry_after=7.0)
    moderator = Limited(ScriptedModerator(failures=[refused]), Limiter(RateLimits(), clock=time, sleep=time.sleep))
    with pytest.raises(ModerationUnavailableError):
        await moderator.moderate(["x"])
    await moderator.moderate(["y"])
    assert time.slept == [7.0]


async def test_a_turn_after_the_deadline_is_refused_and_costs_nothing():
    time = ManualClock()
    limiter = Limiter(RateLimits(requests_per_minute=1, burst_seconds=1.0), clock=time, sleep=time.sleep)
    moderator = Limited(ScriptedModerator(), limiter)
    await moderator.moderate(["x"])
    for _ in range(3):
        with anyio.fail_after(10.0), pytest.raises(ModerationUnavailableError, match=r"60\.0 s") as caught:
            await moderator.moderate(["y"])
    assert caught.value.cause == "deadline"
    assert limiter.waiting == 0


async def test_a_hedge_never_queues_and_a_refused_one_costs_nothing():
    limiter = Limiter(RateLimits(requests_per_minute=1, burst_seconds=1.0), clock=ManualClock())
    for expected in (True, False, False):
        with limiter.try_admit(1) as admitted:
            assert admitted is expected
    slots = Limiter(RateLimits(requests_per_minute=60, burst_seconds=2.0, max_in_flight=1), clock=ManualClock())
    with slots.try_admit(1) as first, slots.try_admit(1) as second:
        assert (first, second, slots.in_flight) == (True, False, 1)
    with slots.try_admit(1) as third:  # the refused one has spent no request
        assert third
    assert slots.in_flight == 0


async def test_cancelled_waiters_leave_the_queue_and_give_their_turn_back():
    limiter = Limiter(RateLimits(requests_per_minute=60, burst_seconds=1.0), clock=ManualClock())
    inner = ScriptedModerator()
    moderator = Limited(inner, limiter)
    calls = [asyncio.create_task(moderator.moderate(["x"])) for _ in range(101)]
    while limiter.waiting < 100:
        await anyio.lowlevel.checkpoint()
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    assert limiter.waiting == 0
    assert len(inner.calls) == 1
    with anyio.fail_after(0.5), pytest.raises(ModerationUnavailableError, match=r"1\.0 s"):
        await moderator.moderate(["x"])


async def test_who_is_cancelled_before_a_slot_is_free_has_spent_no_turn():
    limits = RateLimits(requests_per_minute=60, burst_seconds=5.0, max_in_flight=1)
    limiter = Limiter(limits, clock=ManualClock())
    moderator = Limited(ScriptedModerator(gate=anyio.sleep_forever), limiter)
    calls = [asyncio.create_task(moderator.moderate(["x"])) for _ in range(5)]
    await anyio.wait_all_tasks_blocked()
    for call in reversed(calls):
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    assert limiter.in_flight == 0
    for expected in (True, True, True, True, False):  # one of five was sent
        with limiter.try_admit(1) as admitted:
            assert admitted is expected


async def test_slots_bound_the_requests_in_flight_in_order_of_arrival():
    gate = anyio.Event()
    inner = ScriptedModerator(gate=gate.wait)
    limiter = Limiter(RateLimits(max_in_flight=3))
    moderator = Limited(inner, limiter)
    async with anyio.create_task_group() as group:
        for index in range(10):
            group.start_soon(moderator.moderate, [str(index)])
        await anyio.wait_all_tasks_blocked()
        assert (inner.in_flight, limiter.in_flight) == (3, 3)
        gate.set()
    assert inner.calls == [[str(index)] for index in range(10)]
    assert limiter.in_flight == 0


async def test_cancelled_holders_and_waiters_leave_no_slot_behind():
    slots = SharedSemaphore(2)

    async def hold() -> None:
        async with slots.hold():
            await anyio.sleep_forever()

    calls = [asyncio.create_task(hold()) for _ in range(20)]
    await anyio.wait_all_tasks_blocked()
    # Holders first, so that slots are handed to waiters that are cancelled in the same moment.
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    assert slots.taken == 0
    async with slots.hold():
        assert slots.taken == 1


async def test_slots_are_shared_between_event_loops():
    slots = SharedSemaphore(2)
    seen: list[int] = []

    async def work() -> None:
        async def one() -> None:
            async with slots.hold():
                seen.append(slots.taken)
                await anyio.lowlevel.checkpoint()

        async with anyio.create_task_group() as group:
            for _ in range(25):
                group.start_soon(one)

    await asyncio.gather(*(asyncio.to_thread(asyncio.run, work()) for _ in range(4)))
    assert len(seen) == 100
    assert max(seen) <= 2
    assert slots.taken == 0


def test_a_loop_that_ended_while_waiting_does_not_keep_the_slot():
    slots = SharedSemaphore(1)

    async def holder() -> None:
        async with slots.hold():
            stuck = asyncio.new_event_loop()
            waiting = stuck.create_task(slots._take())
            stuck.call_soon(stuck.stop)
            await asyncio.to_thread(stuck.run_forever)
            waiting.cancel()
            stuck.close()

    asyncio.run(holder())
    assert slots.taken == 0
