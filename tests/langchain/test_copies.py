"""Copies, deep copies, pickles and other processes: what they share, what they carry, what cannot travel."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from tta_langchain_agents import GuardedChatModel, TTAMiddleware

from tta_middleware import Budget, Policy, TTAChatModel
from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.errors import ConfigurationError
from tta_middleware.moderation.openai import OpenAIModerator
from tta_middleware.moderation.stack import production_moderator
from tta_middleware.testing.scripted_engine import ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator

QUESTION = "How are you?"
CALM = "A calm answer about gardens."


def travelled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


def model(**settings: Any) -> TTAChatModel:
    return TTAChatModel(**({"model": ScriptedEngine(CALM), "budget": Budget(generations=3), "policy": 0.4} | settings))


def answers(asked: TTAChatModel, results: Any) -> None:
    results.put(asked.invoke(QUESTION).text)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
async def test_a_copy_shares_what_is_loaded_and_has_settings_of_its_own(copied: Any) -> None:
    moderator = production_moderator()
    first = model(moderator=moderator, tags=["a"])
    second = copied(first)
    assert second.runtime is first.runtime
    assert (second.model, second.moderator) == (first.model, moderator)
    second.policy = 0.9
    assert first.policy == 0.4
    bound = copied(model(moderator="local").bind(policy=0.0, method="none"))
    assert (await bound.ainvoke(QUESTION)).text == Policy().notice


@pytest.mark.parametrize(
    ("update", "says"),
    [
        ({"polcy": 0.1}, "did you mean 'policy'"),
        ({"prompt_check": "usr"}, "'off', 'user' or 'all'"),
        ({"policy": {"violance": 0.1}}, "did you mean 'violence'"),
        ({"moderator": "locl"}, "unknown moderator"),
        ({"max_tokens": 0}, "max_new_tokens"),
    ],
)
def test_a_copy_with_other_settings_is_checked_like_a_new_model(update: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        model().model_copy(update=update)
    guarded = GuardedChatModel(inner=FakeListChatModel(responses=["-"]))
    if set(update) <= {"polcy", "policy", "moderator"}:
        with pytest.raises(ConfigurationError, match=says):
            guarded.model_copy(update=update)


async def test_a_copy_of_a_model_that_has_answered_is_described_as_it_is_now() -> None:
    for first in (model(), GuardedChatModel(inner=FakeListChatModel(responses=[CALM]))):
        await first.ainvoke(QUESTION)
        second = first.model_copy(update={"policy": 0.5, "name": "another"})
        assert (await second.ainvoke(QUESTION)).text == CALM
        assert (first.policy, second.policy) != (0.5, 0.4)
        assert "another" in str(second._serialized)


def test_a_copy_takes_other_names_and_plain_values_and_shares_what_is_loaded() -> None:
    first = model()
    second = first.model_copy(update={"max_tokens": 7, "timeout": 2, "windows": {"first": 5}, "moderator": "openai"})
    assert (second.max_new_tokens, second.windows.first, second.moderator) == (7, 5, "openai")
    assert second.budget == Budget(generations=3, seconds=2)
    assert (first.max_new_tokens, first.budget, first.moderator) == (256, Budget(generations=3), "local")
    assert second.runtime is first.runtime


def test_settings_that_fit_one_another_alone_are_taken_in_any_order(tmp_path: Path) -> None:
    policies = tmp_path / "policies.toml"
    policies.write_text("[policies.strict]\nthreshold = 0.1\n")
    guarded = GuardedChatModel(inner=FakeListChatModel(responses=["-"]), replacement=lambda messages: "-")
    for first, update in (
        (model(), {"policy": "strict", "policies": policies}),
        (guarded, {"on_flagged": "repair", "repair_model": model(), "replacement": None}),
    ):
        for names in permutations(update):
            second = first.model_copy(update={name: update[name] for name in names})
            assert {name: getattr(second, name) for name in update} != {name: getattr(first, name) for name in update}
            assert second.model_fields_set == first.model_fields_set | update.keys()


async def test_a_deep_copy_has_lists_of_its_own() -> None:
    first = model(tags=["a"], stop=["END"])
    second = copy.deepcopy(first)
    second.tags.append("b")
    second.stop.append("c")
    assert (first.tags, first.stop) == (["a"], ["END"])


async def test_a_pickle_carries_settings_and_answers_alike() -> None:
    first = model(moderator="local", fallback="raise", windows={"first": 5})
    assert (await first.ainvoke(QUESTION)).text == CALM
    size = len(pickle.dumps(first))
    second = travelled(first)
    assert size < 20_000
    assert second.runtime is not first.runtime
    assert (second.budget, second.policy, second.fallback, second.windows) == (
        first.budget, first.policy, first.fallback, first.windows,
    )  # fmt: skip
    assert (await second.ainvoke(QUESTION)).text == CALM


@pytest.mark.slow
def test_a_model_answers_in_a_spawned_process() -> None:
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    process = spawn.Process(target=answers, args=(model(moderator="local"), results))
    process.start()
    assert results.get(timeout=120) == CALM
    process.join(60)
    assert process.exitcode == 0


@pytest.mark.slow
async def test_an_engine_travels_without_its_weights() -> None:
    engine = TransformersEngine("smollm2", dtype="float32", max_batch=3)
    await engine.load()
    assert len(pickle.dumps(engine)) < 2_000
    other = travelled(engine)
    assert (other.model_id, other.max_batch, other._dtype, other._loaded) == ("smollm2", 3, "float32", None)
    await engine.aclose()


def test_a_policy_file_is_read_where_it_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("policies.toml").write_text("[policies.default]\nthreshold = 0.25\n")
    first = model(policies="policies.toml", policy=None)
    packed = pickle.dumps(first)
    monkeypatch.chdir("/")
    assert pickle.loads(packed).policies.get().output.threshold == 0.25
    assert copy.deepcopy(first).policies is first.policies
    (tmp_path / "policies.toml").unlink()
    with pytest.raises(ConfigurationError, match=r"cannot read policies\.toml"):
        pickle.loads(packed)


@pytest.mark.parametrize("moderator", [OpenAIModerator, production_moderator])
def test_what_cannot_travel_says_what_to_give_instead(moderator: Any) -> None:
    with pytest.raises(ConfigurationError, match="give it by name"):
        pickle.dumps(model(moderator=moderator()))


async def test_the_guard_around_another_model_and_the_agents_middleware_too() -> None:
    guarded = GuardedChatModel(inner=FakeListChatModel(responses=[CALM]), moderator=ScriptedModerator(), policy=0.3)
    assert copy.deepcopy(guarded).inner is guarded.inner
    for other in (copy.copy(guarded), copy.deepcopy(guarded)):
        assert other.runtime is guarded.runtime
        assert (await other.ainvoke(QUESTION)).text == CALM
    other = travelled(GuardedChatModel(inner=FakeListChatModel(responses=[CALM]), policy=0.3))
    assert (other.policy, (await other.ainvoke(QUESTION)).text) == (0.3, CALM)
    middleware = TTAMiddleware(moderator=production_moderator(), policy=0.3)
    for again in (copy.copy(middleware), copy.deepcopy(middleware)):
        assert again._settings.runtime is middleware._settings.runtime
        assert again._settings.moderator is middleware._settings.moderator
    assert travelled(TTAMiddleware(policy=0.3))._settings.policy == 0.3
