"""A threshold that nobody's scores are held against is an error, and so is a fallback that judges less."""

import pytest
from langchain_core.language_models import GenericFakeChatModel
from tta_langchain_agents import GuardedChatModel, TTAMiddleware

from tta_middleware import Guard, Message, Policy, Repair, TTAChatModel
from tta_middleware.cli.moderate_job import Scorer
from tta_middleware.errors import ConfigurationError, ModerationUnavailableError
from tta_middleware.guard.moderated import moderated
from tta_middleware.moderation.adapters.azure import AzureContentSafetyModerator
from tta_middleware.moderation.adapters.chat_guard import ChatGuardModerator
from tta_middleware.moderation.adapters.guard_formats import GRANITE_GUARDIAN, LLAMA_GUARD
from tta_middleware.moderation.adapters.mistral import MistralModerator
from tta_middleware.moderation.adapters.runnable import RunnableModerator
from tta_middleware.moderation.cache import Cached
from tta_middleware.moderation.embedded import EmbeddedModerator
from tta_middleware.moderation.ensemble import Ensemble
from tta_middleware.moderation.fallback import WithFallback
from tta_middleware.moderation.openai import OpenAIModerator
from tta_middleware.moderation.stack import production_moderator
from tta_middleware.policy import StagePolicies
from tta_middleware.policy.coverage import covering
from tta_middleware.testing.scripted_engine import ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator
from tta_middleware.types import CATEGORIES

ASK = [Message("user", "When does the library open?")]
ILLICIT = Policy(categories={"illicit": 0.1})


def azure() -> AzureContentSafetyModerator:
    return AzureContentSafetyModerator("https://name.example", api_key="k")


def scoring(**scores: float) -> ScriptedModerator:
    return ScriptedModerator(score=lambda _text: scores)


def guard(moderator, policy) -> Guard:
    return Guard(
        ScriptedEngine(lambda _call: "It opens at nine."), moderator, policy=policy, repair=Repair(method=None)
    )


async def letters():
    yield "It opens at nine."


CONSTRUCTED = {
    "guard": guard,
    "chat model": lambda moderator, policy: TTAChatModel(moderator=moderator, policy=policy),
    "guarded model": lambda moderator, policy: GuardedChatModel(
        inner=GenericFakeChatModel(messages=iter(())), moderator=moderator, policy=policy
    ),
    "agent": lambda moderator, policy: TTAMiddleware(moderator, policy=policy),
}


@pytest.mark.parametrize("build", CONSTRUCTED.values(), ids=CONSTRUCTED)
@pytest.mark.parametrize("wrap", [lambda inner: inner, Cached], ids=["plain", "wrapped"])
def test_a_threshold_that_nobody_scores_is_refused_at_construction(build, wrap):
    # Pydantic reports what a validator raises as its own ValueError.
    with pytest.raises(ValueError, match=r"illicit.*'azure-content-safety' does not score"):
        build(wrap(azure()), ILLICIT)
    build(wrap(azure()), Policy(categories={"hate": 0.1}))


@pytest.mark.parametrize("build", list(CONSTRUCTED.values())[1:], ids=list(CONSTRUCTED)[1:])
def test_it_is_refused_for_a_moderator_by_name(build):
    with pytest.raises(ValueError, match=r"political.*'local'"):
        build("local", {"political": 0.2})


def test_it_is_refused_on_the_command_line():
    with pytest.raises(ConfigurationError, match="political"):
        Scorer("local", Policy(categories={"political": 0.2}))


@pytest.mark.parametrize("stage", ["prompt", "output", "repair"])
def test_each_stage_counts(stage):
    policies = StagePolicies.of(0.5).model_copy(update={stage: ILLICIT})
    with pytest.raises(ConfigurationError, match="illicit"):
        guard(azure(), policies)


def test_shadows_and_weights_promise_nothing():
    guard(azure(), Policy(categories={"illicit": 0.1}, shadow=("illicit",), weights={"political": 0.5}))


async def test_a_moderator_that_declares_nothing_is_checked_at_its_first_verdict():
    guarded = guard(scoring(hate=0.0), ILLICIT)
    with pytest.raises(ConfigurationError, match="illicit"):
        await guarded.answer(ASK)
    with pytest.raises(ConfigurationError, match="illicit"):
        assert not [piece async for piece in moderated(letters(), scoring(hate=0.0), ILLICIT)]
    model = GuardedChatModel(
        inner=GenericFakeChatModel(messages=iter(["It opens at nine."] * 2)),
        moderator=scoring(hate=0.0),
        policy=ILLICIT,
    )
    with pytest.raises(ConfigurationError, match="illicit"):
        await model.ainvoke("When does the library open?")
    with pytest.raises(ConfigurationError, match="illicit"):
        assert not [chunk async for chunk in model.astream("When does the library open?")]
    assert (await guard(scoring(illicit=0.0), ILLICIT).answer(ASK)).text == "It opens at nine."


async def test_a_moderator_of_ones_own_may_declare_and_then_name_what_it_found_only():
    async def finds(text: str, _prompt: str | None) -> dict[str, float]:
        return {"hate": 0.01}

    moderator = RunnableModerator(finds, categories=["hate", "illicit"])
    assert (await guard(moderator, ILLICIT).answer(ASK)).text == "It opens at nine."


def test_what_is_declared():
    llama = ChatGuardModerator("m", LLAMA_GUARD, base_url="http://127.0.0.1:1/v1")
    assert OpenAIModerator().categories == EmbeddedModerator().categories == production_moderator().categories
    assert set(azure().categories) == {"hate", "self-harm", "sexual", "violence"}
    assert "health" in MistralModerator(topics=True).categories
    assert "health" not in MistralModerator().categories
    assert {"unsafe", "illicit", "privacy"} <= set(llama.categories)
    assert Ensemble([azure(), OpenAIModerator()]).categories is not None
    assert set(Ensemble([azure(), OpenAIModerator()]).categories) == set(CATEGORIES)
    assert set(Ensemble([azure(), OpenAIModerator()], "first-decisive").categories) == set(azure().categories)
    assert Ensemble([azure(), ScriptedModerator()]).categories is None


def test_a_fallback_that_judges_less_is_refused_unless_that_is_allowed():
    with pytest.raises(ConfigurationError, match=r"'azure-content-safety' does not score .*illicit"):
        WithFallback(OpenAIModerator(), azure())
    with pytest.raises(ConfigurationError, match="allow_fewer_categories"):
        production_moderator(fallback=azure())
    assert production_moderator(fallback=azure(), allow_fewer_categories=True).categories == CATEGORIES
    assert production_moderator(fallback=EmbeddedModerator()).categories == CATEGORIES
    WithFallback(OpenAIModerator(), ChatGuardModerator("m", GRANITE_GUARDIAN, base_url="http://127.0.0.1:1/v1"))


async def test_a_fallback_that_declares_nothing_is_found_out_when_it_is_asked():
    class Down(ScriptedModerator):
        categories = CATEGORIES

    down = [ModerationUnavailableError("down", cause="status")] * 3
    with pytest.raises(ConfigurationError, match="illicit"):
        await WithFallback(Down(failures=down), scoring(hate=0.0)).moderate(["a"])
    for fallback in (ScriptedModerator(), scoring(unsafe=0.0)):
        assert len(await WithFallback(Down(failures=down), fallback).moderate(["a"])) == 1
    allowed = WithFallback(Down(failures=down), scoring(hate=0.0), allow_fewer_categories=True)
    assert len(await allowed.moderate(["a"])) == 1


@pytest.mark.parametrize("declared", [("unsafe",), None])
async def test_thresholds_of_single_categories_hold_while_a_fallback_judges_all_harm_in_one(declared):
    first = ScriptedModerator(failures=[ModerationUnavailableError("down", cause="status")], score=lambda _text: {})
    second = scoring(unsafe=0.6)
    first.categories, second.categories = ("hate", "violence"), declared
    policy = StagePolicies.of(Policy(threshold=0.9, categories={"violence": 0.3}))
    [verdict] = await covering(WithFallback(first, second), policy).moderate(["x"])
    assert verdict.scores == {"hate": 0.6, "violence": 0.6, "unsafe": 0.6}
    decision = policy.output.decide(verdict)
    assert (decision.flagged, decision.category) == (True, "violence")
