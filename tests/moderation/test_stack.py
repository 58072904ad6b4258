"""The production stack over loopback HTTP."""

import asyncio
import logging
import traceback

import anyio
import pytest

from tta_middleware.errors import CircuitOpenError, ModerationError
from tta_middleware.moderation import stack
from tta_middleware.moderation.breaker import BreakerSettings
from tta_middleware.moderation.hedge import HedgeSettings
from tta_middleware.moderation.limits import RateLimits
from tta_middleware.moderation.retry import RetryPolicy
from tta_middleware.moderation.stack import StackSettings, production_moderator
from tta_middleware.testing.fault_server import FaultServer
from tta_middleware.testing.faults import UNAVAILABLE, Fault, always, mixed
from tta_middleware.testing.scripted_moderator import ScriptedModerator

EAGER = RetryPolicy(base_delay=0.0)
FAULTS = (
    UNAVAILABLE,
    Fault("status", status=429),
    Fault("status", status=429, headers=(("retry-after-ms", "1"),)),
    Fault("reset"),
    Fault("truncated"),
    Fault("html"),
    Fault("nan"),
    Fault("missing_category"),
    Fault("wrong_length"),
)


def settings(server: FaultServer, **changes) -> StackSettings:
    return StackSettings(base_url=server.base_url, **{"retry": EAGER, **changes})


async def test_concurrent_repairs_share_requests_and_known_texts_cost_nothing(server):
    async with production_moderator(settings(server), api_key="k") as moderator:
        waves = [[f"candidate {i} of {j}" for i in range(8)] for j in range(32)]
        await asyncio.gather(*(moderator.moderate(wave) for wave in waves))
        assert [len(request.texts) for request in server.requests] == [64] * 4
        await asyncio.gather(*(moderator.moderate(wave) for wave in waves))
        assert len(server.requests) == 4


async def test_under_faults_each_text_gets_its_own_verdict_or_an_error(server):
    server.plan = mixed(0.3, FAULTS, seed=1)
    async with production_moderator(settings(server, breaker=None), api_key="k") as moderator:

        async def ask(index: int) -> str:
            try:
                verdict = (await moderator.moderate([f"{'flagme ' * (index % 2)}{index}"]))[0]
            except ModerationError as error:
                return type(error).__name__
            return "right" if verdict.flagged == bool(index % 2) else "wrong"

        outcomes = []
        for wave in range(10):
            outcomes += await asyncio.gather(*(ask(wave * 30 + index) for index in range(30)))
    assert set(outcomes) <= {"right", "InvalidVerdictError"}
    assert "right" in outcomes


async def test_a_fallback_hides_an_outage_and_the_breaker_spares_the_server(server):
    server.plan = always(UNAVAILABLE)
    breaker = BreakerSettings(minimum_calls=5, open_seconds=3600.0)
    second = ScriptedModerator("second")
    async with production_moderator(settings(server, breaker=breaker), api_key="k", fallback=second) as moderator:
        for index in range(20):
            assert (await moderator.moderate([f"flagme {index}"]))[0].model == "second"
    assert len(server.requests) == 5
    assert len(second.calls) == 20


async def test_verdicts_of_the_fallback_are_not_kept_for_later(server):
    server.plan = always(UNAVAILABLE)
    async with production_moderator(
        settings(server, breaker=None), api_key="k", fallback=ScriptedModerator("second")
    ) as moderator:
        assert (await moderator.moderate(["a"]))[0].model == "second"
        server.plan = always()
        assert (await moderator.moderate(["a"]))[0].model == "omni-moderation-latest"


async def test_an_open_breaker_ends_the_retries_of_a_call(server):
    server.plan = always(UNAVAILABLE)
    breaker = BreakerSettings(minimum_calls=2, open_seconds=3600.0)
    async with production_moderator(settings(server, breaker=breaker), api_key="k") as moderator:
        with pytest.raises(CircuitOpenError):
            await moderator.moderate(["a"])
    assert len(server.requests) == 2


async def test_two_stacks_for_one_server_share_its_breaker(server):
    server.plan = always(UNAVAILABLE)
    breaker = BreakerSettings(minimum_calls=2, open_seconds=3600.0)
    for expected in (2, 2):
        async with production_moderator(settings(server, breaker=breaker), api_key="k") as moderator:
            with pytest.raises(CircuitOpenError):
                await moderator.moderate(["a"])
        assert len(server.requests) == expected


async def test_everything_at_once_still_answers(server):
    everything = settings(server, hedge=HedgeSettings(), limits=RateLimits(requests_per_minute=1e6, max_in_flight=4))
    async with production_moderator(everything, api_key="k") as moderator:
        for index in range(40):
            assert (await moderator.moderate([f"flagme {index}"]))[0].flagged


async def test_hedges_stay_within_the_requests_that_may_be_in_flight(monkeypatch):
    most = 0

    async def slow() -> None:
        nonlocal most
        most = max(most, inner.in_flight)
        await anyio.sleep(0.005)

    inner = ScriptedModerator()
    monkeypatch.setattr(stack, "OpenAIModerator", lambda *_arguments, **_settings: inner)
    eager = StackSettings(
        coalescing=None, cache=None, limits=RateLimits(max_in_flight=4), hedge=HedgeSettings(minimum_samples=1)
    )
    moderator = production_moderator(eager)
    await moderator.moderate(["known to be quick"])
    inner._gate = slow
    for wave in range(5):
        await asyncio.gather(*(moderator.moderate([f"text {index} of {wave}"]) for index in range(3)))
    assert len(inner.calls) > 16  # some were sent twice
    assert most == 4


async def test_cancelling_everything_in_flight_leaves_nothing():
    with FaultServer(always(Fault("hang"))) as server:
        chosen = settings(server, coalescing=None, limits=RateLimits(max_in_flight=40, requests_per_minute=1e6))
        async with production_moderator(chosen, api_key="k") as moderator:
            before = asyncio.all_tasks()
            calls = [asyncio.create_task(moderator.moderate([f"text {index}"])) for index in range(100)]
            while len(server.requests) < 40:
                await anyio.lowlevel.checkpoint()
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            assert asyncio.all_tasks() <= before
            while server.connections:
                await anyio.lowlevel.checkpoint()
            limiter = moderator._inner._inner._inner.limiter
            assert (limiter.in_flight, limiter.waiting) == (0, 0)


def test_loops_of_several_threads_share_one_stack():
    async def ask(name: int) -> list[bool]:
        answers = await asyncio.gather(*(moderator.moderate([f"flagme {name} {i}"]) for i in range(20)))
        return [verdicts[0].flagged for verdicts in answers]

    async def main() -> list[list[bool]]:
        return await asyncio.gather(*(asyncio.to_thread(asyncio.run, ask(name)) for name in range(4)))

    with FaultServer() as server:
        chosen = settings(server, limits=RateLimits(max_in_flight=2, requests_per_minute=1e6))
        moderator = production_moderator(chosen, api_key="k")
        assert asyncio.run(main()) == [[True] * 20] * 4


@pytest.mark.parametrize("kind", ["status", "reset", "html", "nan"])
async def test_no_text_in_logs_or_errors(server, caplog, kind):
    caplog.set_level(logging.DEBUG)
    server.plan = always(Fault(kind))
    words = "the quick brown fox 7741"
    async with production_moderator(settings(server), api_key="sk-test") as moderator:
        with pytest.raises(ModerationError) as caught:
            await moderator.moderate([words], prompt=words)
    told = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert words not in told
    assert "sk-test" not in told
