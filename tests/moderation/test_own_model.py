"""``moderator="self"``: the model that answers judges its answers, wherever a moderator is named."""

from typing import Any

import pytest

from tta_middleware import Guard, Message, Policy, Repair, TTAChatModel
from tta_middleware.assembly import Runtime
from tta_middleware.errors import ConfigurationError
from tta_middleware.moderation.ensemble import Ensemble
from tta_middleware.moderation.llm_judge import JudgeCalibration, LLMJudge
from tta_middleware.registry import check_moderator, moderators_in, resolve_moderator
from tta_middleware.testing.judging_engine import JudgingEngine
from tta_middleware.testing.scripted_engine import ScriptedEngine


async def test_the_chat_model_asks_the_engine_that_answers() -> None:
    engine = JudgingEngine()
    model = TTAChatModel(model=engine, moderator="self", method="none")
    said = await model.ainvoke("Well?")
    assert said.text == Policy().notice
    assert said.response_metadata["tta"]["moderator"] == "self"
    assert any("Answer: flagme" in question for question in engine.questions)
    await model.aclose()
    assert not engine.closed  # it is the caller's


async def test_streams_are_judged_window_by_window() -> None:
    engine = JudgingEngine(lambda _call: "word " * 40 + "flagme " + "word " * 10)
    model = TTAChatModel(model=engine, moderator="self", method="none")
    text = "".join([chunk.text async for chunk in model.astream("Well?")])
    assert text.startswith("word word")
    assert "flagme" not in text
    assert text.endswith(Policy().notice)


def test_one_runtime_has_one_judge_per_engine() -> None:
    runtime, one, other = Runtime(), JudgingEngine(), JudgingEngine()
    assert runtime.moderator("self", one) is runtime.moderator("self", one)
    assert runtime.moderator("self", one) is not runtime.moderator("self", other)
    assert runtime.moderator("local", one) is runtime.moderator("local", other)


def test_several_are_asked_side_by_side() -> None:
    both = resolve_moderator("self+local", engine=JudgingEngine())
    assert isinstance(both, Ensemble)
    assert {"unsafe", "illicit"} <= set(both.categories or ())
    assert moderators_in("guard:/models/a+b+local") == ["guard:/models/a+b", "local"]
    TTAChatModel(moderator="self+local", policy=Policy(categories={"illicit": 0.1}))
    for wrong in ("self+nonsense", "self+", "+"):
        with pytest.raises(ConfigurationError, match="unknown moderator"):
            moderators_in(wrong)


def test_where_no_engine_answers_the_error_says_what_to_do() -> None:
    with pytest.raises(ConfigurationError, match="say guard:MODEL"):
        resolve_moderator("self")
    with pytest.raises(ConfigurationError, match="say guard:MODEL"):
        check_moderator("local+self", None)
    check_moderator("guard:smollm2+local", None)


def test_an_engine_that_cannot_be_asked_is_refused_when_the_model_is_made() -> None:
    scripted: Any = ScriptedEngine(lambda _call: "x")
    with pytest.raises(ValueError, match=r"ScriptedEngine has no .*next_token_logprobs.*guard:MODEL"):
        TTAChatModel(model=scripted, moderator="self")
    check_moderator("self", "smollm2")


async def test_a_calibration_is_looked_up_by_the_model() -> None:
    asked: list[str] = []

    def known(model: str) -> JudgeCalibration:
        asked.append(model)
        return JudgeCalibration(centre=100.0)

    engine = JudgingEngine()
    judge = resolve_moderator("self", engine=engine, calibration=known)
    assert isinstance(judge, LLMJudge)
    assert asked == [engine.model_id]
    answer = await Guard(engine, judge, repair=Repair(method=None)).answer([Message("user", "Well?")])
    assert answer.text == "flagme"
