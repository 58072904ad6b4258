"""The retry policy with staged clock, sleeper and jitter; nothing waits."""

import pickle
import random
from datetime import UTC, datetime

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tta_middleware.errors import (
    CircuitOpenError,
    ConfigurationError,
    InvalidVerdictError,
    ModerationRejectedError,
    ModerationUnavailableError,
)
from tta_middleware.moderation.failures import from_status, retry_after
from tta_middleware.moderation.retry import Retrier, RetryPolicy, delay, is_retryable
from tta_middleware.testing.virtual_time import ManualClock

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

policies = st.builds(
    RetryPolicy,
    attempts=st.integers(1, 12),
    max_elapsed=st.floats(0.1, 100.0),
    base_delay=st.floats(0.0, 50.0),
    max_delay=st.floats(0.0, 50.0),
    max_retry_after=st.floats(0.0, 50.0),
)
waits_asked = st.none() | st.floats(0.0, 100.0)


def failing(times: int, time: ManualClock, *, takes: float = 0.0, asked: float | None = None):
    calls = []

    async def call() -> str:
        calls.append(time.now)
        time.now += takes
        if len(calls) <= times:
            raise ModerationUnavailableError("staged", cause="status", retry_after=asked)
        return "verdict"

    return call, calls


def retrier(policy: RetryPolicy, time: ManualClock, seed: int = 0) -> Retrier:
    return Retrier(policy, clock=time, sleep=time.sleep, rng=random.Random(seed))


@given(policy=policies, attempt=st.integers(1, 2000), asked=waits_asked, seed=st.integers(0, 99))
def test_no_wait_is_above_the_cap_or_below_the_servers_wish(policy, attempt, asked, seed):
    seconds = delay(policy, attempt, asked, random.Random(seed))
    if seconds is None:
        assert attempt >= policy.attempts or asked > policy.max_retry_after
    else:
        assert 0.0 <= seconds <= max(policy.max_delay, asked or 0.0)
        assert asked is None or asked <= seconds <= max(policy.max_delay, policy.max_retry_after)


@given(policy=policies, asked=waits_asked, takes=st.floats(0.0, 5.0), seed=st.integers(0, 99))
def test_attempts_and_elapsed_time_are_both_bounded(policy, asked, takes, seed):
    time = ManualClock()
    call, calls = failing(1000, time, takes=takes, asked=asked)

    async def run() -> None:
        with pytest.raises(ModerationUnavailableError, match="staged"):
            await retrier(policy, time, seed).call(call)

    anyio.run(run)
    assert len(calls) <= policy.attempts
    assert calls[-1] <= policy.max_elapsed


async def test_waits_grow_and_stay_random_below_the_ceiling():
    time = ManualClock()
    call, _ = failing(6, time)
    policy = RetryPolicy(attempts=7, base_delay=1.0, max_delay=8.0, max_elapsed=100.0)
    assert await retrier(policy, time).call(call) == "verdict"
    ceilings = [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    assert all(0.0 <= slept <= top for slept, top in zip(time.slept, ceilings, strict=True))
    assert len(set(time.slept)) == 6


async def test_the_servers_pause_is_kept():
    time = ManualClock()
    call, calls = failing(1, time, asked=7.0)
    await retrier(RetryPolicy(), time).call(call)
    assert calls[1] >= 7.0


async def test_a_server_that_asks_for_too_long_is_left_alone_and_the_error_keeps_its_wish():
    time = ManualClock()
    call, calls = failing(9, time, asked=60.0)
    with pytest.raises(ModerationUnavailableError) as caught:
        await retrier(RetryPolicy(max_retry_after=20.0), time).call(call)
    assert (len(calls), time.slept, caught.value.retry_after) == (1, [], 60.0)


async def test_a_wait_past_the_callers_deadline_is_not_begun():
    time = ManualClock()
    call, calls = failing(9, time, asked=5.0)
    with anyio.fail_after(3.0), pytest.raises(ModerationUnavailableError, match="staged"):
        await retrier(RetryPolicy(), time).call(call)
    assert (len(calls), time.slept) == (1, [])


async def test_a_hanging_call_ends_with_max_elapsed():
    with pytest.raises(ModerationUnavailableError) as caught:
        await Retrier(RetryPolicy(max_elapsed=0.01)).call(anyio.sleep_forever)
    assert caught.value.cause == "timeout"


async def test_cancellation_passes_through():
    with anyio.move_on_after(0.01) as scope:
        await Retrier().call(anyio.sleep_forever)
    assert scope.cancelled_caught


@pytest.mark.parametrize(
    "error",
    [
        ModerationRejectedError("key"),
        InvalidVerdictError("html"),
        CircuitOpenError("open"),
        ModerationUnavailableError("late", cause="deadline"),
        ValueError("a bug"),
    ],
)
async def test_what_a_retry_cannot_cure_is_raised_at_once(error):
    calls = []

    async def call() -> None:
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        await Retrier().call(call)
    assert len(calls) == 1
    assert not is_retryable(error, RetryPolicy())


async def test_unusable_answers_are_asked_for_again_on_request_only():
    time = ManualClock()
    answers = iter([InvalidVerdictError("html"), InvalidVerdictError("html"), "verdict"])

    async def call() -> str:
        answer = next(answers)
        if isinstance(answer, InvalidVerdictError):
            raise answer
        return answer

    assert await retrier(RetryPolicy(invalid_answers=True), time).call(call) == "verdict"
    answers = iter([InvalidVerdictError("html")] * 2)
    with pytest.raises(InvalidVerdictError, match="2 attempts"):
        await retrier(RetryPolicy(invalid_answers=True, attempts=2), time).call(call)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "9"}, 9.0),
        ({"retry-after": "Fri, 02 Jan 2026 03:04:15 GMT"}, 10.0),
        ({"retry-after": "Fri, 02 Jan 2026 03:04:15 -0000"}, 10.0),
        ({"retry-after": "Thu, 01 Jan 2026 00:00:00 GMT"}, 0.0),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "tomorrow"}, None),
        ({"retry-after": ""}, None),
    ],
)
def test_retry_after_is_read_in_all_its_forms(headers, seconds):
    assert retry_after(headers, NOW) == seconds


@given(st.text(max_size=40))
def test_no_retry_after_header_can_break_the_client(value):
    seconds = retry_after({"retry-after": value, "retry-after-ms": value}, NOW)
    assert seconds is None or seconds >= 0.0


def test_an_error_code_that_is_not_an_identifier_is_left_out():
    error = from_status(400, {}, code="your text was: hello", where="here", key_variable="KEY")
    assert "hello" not in str(error)


def test_errors_keep_their_attributes_through_pickle():
    for error in (
        ModerationUnavailableError("x", cause="rate_limit", retry_after=2.0),
        CircuitOpenError("y", cause="circuit_open", retry_after=1.0),
        ModerationRejectedError("z", status=401),
    ):
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


def test_policy_mistakes_are_configuration_errors():
    with pytest.raises(ConfigurationError, match="attempts"):
        RetryPolicy(attempts=0)
