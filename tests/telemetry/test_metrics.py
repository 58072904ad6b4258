"""What the metrics count, in memory."""

from __future__ import annotations

from typing import Any

import pytest
from memory import Memory, ask, guard, read

from tta_middleware import Guard, Policy, Repair
from tta_middleware.config import Reasoning
from tta_middleware.errors import EngineError, ModerationUnavailableError
from tta_middleware.moderation.breaker import BreakerSettings, CircuitBreaker, WithBreaker
from tta_middleware.telemetry import format as names
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging


def counted(memory: Memory, metric: str, *labels: str) -> dict[Any, float]:
    """Counts of a metric's points by these labels."""
    return {
        tuple((point.attributes or {}).get(label) for label in labels): getattr(point, "value", None) or point.count
        for point in memory.points(metric)
    }


async def test_answers_by_outcome(memory: Memory) -> None:
    away = ScriptedModerator(failures=[ModerationUnavailableError("away", cause="timeout")] * 9)
    await read(guard().stream(ask()))
    await guard().answer(ask("late"))
    await guard(repair=Repair()).answer(ask("attack"))
    await guard(away, policy=Policy(on_error="open")).answer(ask())
    with pytest.raises(EngineError):
        await guard().answer(ask("broken"))
    await read(guard().stream(ask()), 1)
    outcomes = counted(memory, names.ANSWERS, names.OUTCOME, names.ERROR)
    assert outcomes == {
        ("clean", None): 1,
        ("neutralised", None): 1,
        ("blocked", None): 1,
        ("unchecked", None): 1,
        ("failed", "EngineError"): 1,
        ("cancelled", "cancelled"): 1,
    }
    assert sum(counted(memory, names.DURATION, names.OUTCOME).values()) == 6
    assert counted(memory, names.FIRST_CHUNK, names.OUTCOME) == {("clean",): 1, ("cancelled",): 1}
    flagged = {("output", "illicit", "neutralised"): 1, ("output", "illicit", "blocked"): 1}
    assert counted(memory, names.FLAGGED, names.STAGE, names.CATEGORY, names.OUTCOME) == flagged
    assert counted(memory, names.REPAIR_GENERATIONS, names.OUTCOME) == {("neutralised",): 1}
    kinds = counted(memory, names.TOKENS, names.TOKEN_TYPE, names.OUTCOME)
    assert kinds["input", "clean"] == kinds["output", "clean"] == 1


async def test_sums_are_those_of_the_trace(memory: Memory) -> None:
    answer = await guard().answer(ask("late"))
    sums = {(point.attributes or {})[names.TOKEN_TYPE]: point.sum for point in memory.points(names.TOKENS)}
    assert sums == {"input": answer.prompt_tokens, "output": answer.trace.generated_tokens}
    [repair] = memory.points(names.REPAIR_GENERATIONS)
    assert repair.sum == answer.trace.generations - 1
    assert sum(point.count for point in memory.points(names.MODERATION_DURATION)) == answer.trace.moderation_calls


async def test_a_refused_prompt_counts_as_flagged_at_its_stage(memory: Memory) -> None:
    await guard(prompt_check="user").answer(ask("something forbidden"))
    assert counted(memory, names.FLAGGED, names.STAGE, names.CATEGORY) == {("prompt", "illicit"): 1}


@pytest.mark.parametrize("mode", ["hide", "show"])
async def test_a_flagged_thought_counts_at_its_stage(memory: Memory, mode: Any) -> None:
    def script(call: ScriptedCall) -> str:
        closed = "</think>" in call.prefix or call.moved
        return "A calm answer." if closed else "<think>\nSomething forbidden.\n</think>\n\nA calm answer."

    engine = ScriptedEngine(script, thinking=True)
    await read(
        Guard(engine, ScriptedModerator(score=flagging("forbidden")), reasoning=Reasoning(mode=mode)).stream(ask())
    )
    assert counted(memory, names.FLAGGED, names.STAGE) == {("reasoning",): 1}


async def test_moderation_that_failed_names_its_error(memory: Memory) -> None:
    await guard(ScriptedModerator(failures=[ModerationUnavailableError("away", cause="timeout")])).answer(ask())
    errors = counted(memory, names.MODERATION_DURATION, names.STAGE, names.ERROR)
    assert errors == {("output", "ModerationUnavailableError"): 1}


async def test_the_breaker_s_worst_state_is_a_gauge(memory: Memory) -> None:
    opening = CircuitBreaker(BreakerSettings(minimum_calls=1))
    calm = WithBreaker(ScriptedModerator("breaker test"), CircuitBreaker())
    failing = WithBreaker(ScriptedModerator("breaker test"), opening)

    def point() -> float:
        [value] = [one.value for one in memory.points(names.BREAKER) if one.attributes[names.MODERATOR] == calm.name]
        return float(value)

    assert point() == 0
    opening.record(opening.acquire(), "failure")
    assert failing.breaker.state == "open"
    assert point() == 2


@pytest.mark.parametrize("metric", sorted(names.METRICS))
async def test_points_have_no_labels_but_those_that_are_listed(memory: Memory, metric: str) -> None:
    await read(guard(prompt_check="user").stream(ask("late")))
    await guard(repair=Repair()).answer(ask("attack"))
    for point in memory.points(metric):
        assert set(point.attributes or {}) <= set(names.METRICS[metric].attributes)
