"""The circuit breaker on a clock that only the test moves."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tta_middleware.errors import (
    CircuitOpenError,
    InvalidVerdictError,
    ModerationRejectedError,
    ModerationUnavailableError,
)
from tta_middleware.moderation.breaker import BreakerSettings, CircuitBreaker, WithBreaker
from tta_middleware.moderation.stack import shared_breaker
from tta_middleware.testing.scripted_moderator import ScriptedModerator
from tta_middleware.testing.virtual_time import ManualClock

SETTINGS = BreakerSettings(window=10.0, minimum_calls=4, failure_rate=0.5, open_seconds=5.0)
DOWN = ModerationUnavailableError("down", cause="status")

ALLOWED = {("closed", "open"), ("open", "half-open"), ("half-open", "open"), ("half-open", "closed")}


def opened(settings: BreakerSettings = SETTINGS) -> tuple[CircuitBreaker, ManualClock]:
    clock = ManualClock(100.0)
    breaker = CircuitBreaker(settings, clock=clock)
    for _ in range(settings.minimum_calls):
        breaker.record(breaker.acquire(), "failure")
    assert breaker.state == "open"
    return breaker, clock


def changes(breaker: CircuitBreaker) -> list[tuple[str, str]]:
    return [(transition.before, transition.after) for transition in breaker.transitions]


def test_it_opens_at_the_failure_rate_and_says_when_the_next_try_is_due():
    breaker, clock = opened()
    clock.now += 2.0
    with pytest.raises(CircuitOpenError, match=r"3\.0 s") as caught:
        breaker.acquire()
    assert (caught.value.retry_after, breaker.refused) == (3.0, 1)


def test_few_calls_say_nothing():
    breaker = CircuitBreaker(SETTINGS, clock=ManualClock(100.0))
    for _ in range(3):
        breaker.record(breaker.acquire(), "failure")
    assert breaker.state == "closed"


def test_failures_below_the_rate_leave_it_closed():
    breaker = CircuitBreaker(SETTINGS, clock=ManualClock(100.0))
    for outcome in ["success", "success", "failure"] * 20:
        breaker.record(breaker.acquire(), outcome)
    assert breaker.state == "closed"


def test_old_calls_are_forgotten():
    clock = ManualClock(100.0)
    breaker = CircuitBreaker(SETTINGS, clock=clock)
    for _ in range(12):
        breaker.record(breaker.acquire(), "failure")
        clock.now += 4.0
    assert breaker.state == "closed"


def test_one_probe_at_a_time_and_success_closes_it():
    breaker, clock = opened()
    clock.now += 5.0
    probe = breaker.acquire()
    with pytest.raises(CircuitOpenError):
        breaker.acquire()
    breaker.record(probe, "success")
    assert changes(breaker) == [("closed", "open"), ("open", "half-open"), ("half-open", "closed")]
    breaker.acquire()


def test_a_failed_probe_opens_it_for_another_full_time():
    breaker, clock = opened()
    clock.now += 5.0
    breaker.record(breaker.acquire(), "failure")
    clock.now += 4.9
    with pytest.raises(CircuitOpenError):
        breaker.acquire()
    clock.now += 0.1
    breaker.acquire()
    assert breaker.state == "half-open"


def test_a_cancelled_probe_makes_room_for_the_next():
    breaker, clock = opened()
    clock.now += 5.0
    breaker.record(breaker.acquire(), "unknown")
    breaker.record(breaker.acquire(), "success")
    assert breaker.state == "closed"


def test_several_probes_may_be_asked_for():
    breaker, clock = opened(SETTINGS.model_copy(update={"probes": 2}))
    clock.now += 5.0
    breaker.record(breaker.acquire(), "success")
    assert breaker.state == "half-open"
    breaker.record(breaker.acquire(), "success")
    assert breaker.state == "closed"


def test_calls_from_before_the_last_change_no_longer_count():
    clock = ManualClock(100.0)
    breaker = CircuitBreaker(SETTINGS, clock=clock)
    late = [breaker.acquire() for _ in range(10)]
    for permit in late[:4]:
        breaker.record(permit, "failure")
    clock.now += 5.0
    probe = breaker.acquire()
    for permit in late[4:]:
        breaker.record(permit, "failure")
    breaker.record(probe, "success")
    assert breaker.state == "closed"


@given(
    st.lists(
        st.tuples(st.sampled_from(["success", "failure", "unknown"]), st.floats(0.0, 4.0), st.integers(0, 3)),
        max_size=80,
    )
)
def test_only_allowed_transitions_and_never_two_probes(steps):
    clock = ManualClock(100.0)
    breaker = CircuitBreaker(SETTINGS, clock=clock)
    pending: list[tuple[int, str]] = []
    probing: set[int] = set()
    for outcome, passed, late in steps:
        clock.now += passed
        try:
            permit = breaker.acquire()
        except CircuitOpenError:
            assert breaker.state != "closed"
        else:
            assert breaker.state != "open"
            if breaker.state == "half-open":
                assert permit not in probing
                probing.add(permit)
            pending.append((permit, outcome))
        while len(pending) > late:
            done, how = pending.pop(0)
            breaker.record(done, how)
            probing.discard(done)
    assert set(changes(breaker)) <= ALLOWED
    for first, second in zip(changes(breaker), changes(breaker)[1:], strict=False):
        assert first[1] == second[0]


def test_threads_share_it_without_losing_count():
    breaker = CircuitBreaker(BreakerSettings(minimum_calls=4000, failure_rate=1.0), clock=ManualClock(100.0))

    def fail() -> None:
        for _ in range(1000):
            breaker.record(breaker.acquire(), "failure")

    threads = [threading.Thread(target=fail) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert breaker.state == "open"


@pytest.mark.parametrize(
    ("failure", "state"),
    [
        (DOWN, "open"),
        (InvalidVerdictError("html"), "open"),
        (ModerationUnavailableError("slow down", cause="rate_limit"), "closed"),
        (ModerationUnavailableError("late", cause="deadline"), "closed"),
        (ModerationRejectedError("key", status=401), "closed"),
    ],
)
async def test_only_a_server_that_does_not_work_opens_it(failure, state):
    breaker = CircuitBreaker(SETTINGS, clock=ManualClock(100.0))
    moderator = WithBreaker(ScriptedModerator(failures=[failure] * 4), breaker)
    for _ in range(4):
        with pytest.raises(type(failure)):
            await moderator.moderate(["x"])
    assert breaker.state == state


async def test_an_open_breaker_sends_nothing():
    breaker, clock = opened()
    inner = ScriptedModerator()
    moderator = WithBreaker(inner, breaker)
    with pytest.raises(CircuitOpenError):
        await moderator.moderate(["x"])
    assert inner.calls == []
    clock.now += 5.0
    assert len(await moderator.moderate(["x"])) == 1
    assert breaker.state == "closed"


def test_a_process_has_one_breaker_per_server():
    one = shared_breaker("http://a.example/v1", SETTINGS)
    assert shared_breaker("http://a.example/v1", BreakerSettings(**SETTINGS.model_dump())) is one
    assert shared_breaker("http://b.example/v1", SETTINGS) is not one
