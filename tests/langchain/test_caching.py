"""LangChain's cache: what is kept of a guarded model, and to which requests it is served."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.caches import BaseCache, InMemoryCache
from langchain_core.callbacks import AsyncCallbackHandler
from langchain_core.globals import set_llm_cache
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_core.load import dumps
from langchain_core.runnables import RunnableLambda
from langchain_core.tracers._streaming import _StreamingCallbackHandler
from tta_langchain_agents import GuardedChatModel

from tta_middleware import Policy, TTAChatModel
from tta_middleware.errors import ModerationUnavailableError
from tta_middleware.moderation.adapters.runnable import RunnableModerator
from tta_middleware.policy.file import PolicyFile
from tta_middleware.testing.scripted_engine import ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator

QUESTION = "How are you?"
CALM = "A calm answer about gardens."
DOWN = ModerationUnavailableError("down for a test")

Ask = Callable[..., Awaitable[Any]]


async def by_invoke(model: Any, **settings: Any) -> Any:
    return model.invoke(QUESTION, **settings)


async def by_ainvoke(model: Any, **settings: Any) -> Any:
    return await model.ainvoke(QUESTION, **settings)


async def by_generate(model: Any, **settings: Any) -> Any:
    return model.generate([model._convert_input(QUESTION).to_messages()], **settings).generations[0][0].message


WAYS: list[Ask] = [by_invoke, by_ainvoke, by_generate]


@pytest.fixture
def cache() -> Iterator[InMemoryCache]:
    shared = InMemoryCache()
    set_llm_cache(shared)
    yield shared
    set_llm_cache(None)


def scripted(script: Any = CALM, **settings: Any) -> TTAChatModel:
    defaults = {"model": ScriptedEngine(script), "moderator": ScriptedModerator()}
    return TTAChatModel(**(defaults | settings))


def kept(cache: InMemoryCache) -> int:
    return len(cache._cache)


@pytest.mark.parametrize("ask", WAYS)
async def test_an_answer_that_passed_is_served_again_without_decoding(cache: InMemoryCache, ask: Ask) -> None:
    model = scripted()
    first = await ask(model)
    steps = model.model.steps
    second = await ask(model)
    assert (second.text, model.model.steps, kept(cache)) == (first.text, steps, 1)
    assert len(model.moderator.calls) == 1


@pytest.mark.parametrize("ask", WAYS)
@pytest.mark.parametrize("on_error", ["closed", "open"])
async def test_what_an_outage_made_is_not_kept(cache: InMemoryCache, ask: Ask, on_error: Any) -> None:
    moderator = ScriptedModerator(failures=[DOWN])
    model = scripted(moderator=moderator, policy=Policy(on_error=on_error))
    first = await ask(model)
    assert first.response_metadata["tta"]["outcome"] == ("blocked" if on_error == "closed" else "unchecked")
    assert kept(cache) == 0
    assert (await ask(model)).text == CALM


@pytest.mark.parametrize("ask", WAYS)
async def test_a_blocked_answer_is_not_kept(cache: InMemoryCache, ask: Ask) -> None:
    model = scripted("Then flagme, yes.", method="none")
    assert (await ask(model)).response_metadata["finish_reason"] == "content_filter"
    assert kept(cache) == 0


@pytest.mark.parametrize("ask", WAYS)
async def test_what_a_moderators_model_is_told_is_not_kept_where_it_is_made_without_a_cache(
    cache: InMemoryCache, ask: Ask
) -> None:
    asks = RunnableLambda(lambda given: given["text"]) | FakeListChatModel(responses=["0.9"], cache=False)
    moderator = RunnableModerator(asks, parse=lambda said: float(said.text))
    model = scripted("Then flagme, yes.", moderator=moderator, method="none")
    assert (await ask(model)).response_metadata["finish_reason"] == "content_filter"
    assert kept(cache) == 0


async def test_a_repaired_answer_is_kept(cache: InMemoryCache) -> None:
    model = scripted(lambda call: CALM if call.moved else "Then flagme, yes.", method="noise")
    first, second = [await model.ainvoke(QUESTION) for _ in range(2)]
    assert first.response_metadata["tta"]["outcome"] == "neutralised"
    assert (second.text, kept(cache)) == (first.text, 1)


OTHER_REQUESTS: list[dict[str, Any]] = [
    {"policy": 0.01},
    {"policy": Policy(threshold=0.5, notice="Not today.")},
    {"prompt_check": "user"},
    {"fallback": "raise"},
    {"windows": {"first": 5}},
    {"release": "end"},
    {"method": "noise"},
    {"budget": {"generations": 3}},
    {"bridges": ()},
    {"max_new_tokens": 3},
    {"max_tokens": 3},
    {"temperature": 0.5},
    {"top_p": 0.5},
    {"seed": 5},
    {"stop": ["calm"]},
]


@pytest.mark.parametrize("other", OTHER_REQUESTS, ids=str)
async def test_a_request_that_differs_has_an_answer_of_its_own(cache: InMemoryCache, other: dict[str, Any]) -> None:
    engine, moderator = ScriptedEngine(CALM), ScriptedModerator()
    await scripted(model=engine, moderator=moderator).ainvoke(QUESTION)
    asked = engine.steps
    await scripted(model=engine, moderator=moderator).ainvoke(QUESTION, **other)
    assert engine.steps > asked
    asked = engine.steps
    await scripted(model=engine, moderator=moderator, **other).ainvoke("Another?")
    await scripted(model=engine, moderator=moderator).ainvoke("Another?")
    assert engine.steps > asked + len(CALM.split())


async def test_a_stricter_moderator_is_asked_again(cache: InMemoryCache) -> None:
    engine, moderator = ScriptedEngine("A middling answer."), ScriptedModerator(score=lambda _: {"violence": 0.4})
    ask = scripted(model=engine, moderator=moderator, method="none")
    assert (await ask.ainvoke(QUESTION)).text == "A middling answer."
    moderator.default_threshold = 0.3
    assert (await ask.ainvoke(QUESTION)).text == Policy().notice
    stricter = ScriptedModerator(score=lambda _: {"violence": 0.9})
    assert (await scripted(model=engine, moderator=stricter, method="none").ainvoke(QUESTION)).text == Policy().notice


@pytest.mark.parametrize("ask", WAYS)
async def test_a_tightened_policy_file_is_not_answered_from_the_cache(
    cache: InMemoryCache, tmp_path: Path, ask: Ask
) -> None:
    file = tmp_path / "policies.toml"
    file.write_text("[policies.default]\nthreshold = 0.5\n")
    model = scripted(method="none", policies=PolicyFile(file), policy="default")
    assert (await ask(model)).text == CALM
    file.write_text("[policies.default]\nthreshold = 0.0\nnotice = 'Not today.'\n")
    assert (await ask(model)).text == "Not today."


async def test_an_answer_is_kept_under_the_policy_that_it_was_decided_by(cache: InMemoryCache, tmp_path: Path) -> None:
    """The file is loosened after the key was made and before the request is decided, then tightened again."""
    file = tmp_path / "policies.toml"
    loose, strict = "[policies.default]\nthreshold = 1.0\n", "[policies.default]\nthreshold = 0.0\n"
    file.write_text(strict)
    policies = PolicyFile(file)

    class Loosening(InMemoryCache):
        async def alookup(self, prompt: str, llm_string: str) -> Any:
            file.write_text(loose)
            return await super().alookup(prompt, llm_string)

    model = scripted(method="none", policies=policies, cache=Loosening())
    assert (await model.ainvoke(QUESTION)).text == Policy().notice
    file.write_text(strict)
    assert (await model.ainvoke(QUESTION)).text == Policy().notice


class Streams(AsyncCallbackHandler, _StreamingCallbackHandler):
    """What makes ``invoke`` stream."""

    def tap_output_aiter(self, run_id: Any, output: AsyncIterator[Any]) -> AsyncIterator[Any]:
        return output

    def tap_output_iter(self, run_id: Any, output: Iterator[Any]) -> Iterator[Any]:
        return output


async def test_a_streamed_answer_does_not_stand_in_for_one_that_was_checked_whole(cache: InMemoryCache) -> None:
    model = scripted()
    streamed: Any = {"callbacks": [Streams()]}
    await model.ainvoke(QUESTION, streamed)
    steps = model.model.steps
    await model.ainvoke(QUESTION, streamed)
    assert model.model.steps == steps
    await model.ainvoke(QUESTION)
    assert model.model.steps > steps


async def test_a_stream_behind_invoke_keeps_no_blocked_answer(cache: InMemoryCache) -> None:
    model = scripted("Then flagme, yes.", method="none")
    for _ in range(2):
        answer = await model.ainvoke(QUESTION, {"callbacks": [Streams()]})
        assert answer.text == Policy().notice
    assert kept(cache) == 0


@pytest.mark.parametrize("ask", WAYS)
async def test_a_cache_of_the_models_own_and_none(ask: Ask) -> None:
    own = InMemoryCache()
    model = scripted(cache=own)
    await ask(model)
    await ask(model)
    assert (kept(own), len(model.moderator.calls)) == (1, 1)
    blocked = scripted("Then flagme, yes.", method="none", cache=own)
    await ask(blocked)
    assert kept(own) == 1
    with pytest.raises(ValueError, match="no cache found"):
        await ask(scripted(cache=True))


@pytest.mark.parametrize("ask", WAYS)
async def test_the_global_cache_on_and_off(cache: InMemoryCache, ask: Ask) -> None:
    off, on = scripted(cache=False), scripted(cache=True)
    for model in (off, off, on, on):
        await ask(model)
    assert (len(off.moderator.calls), len(on.moderator.calls), kept(cache)) == (2, 1, 1)


async def test_tools_are_part_of_the_request(cache: InMemoryCache) -> None:
    def one(x: int) -> int:
        """One."""
        return x

    def two(x: int) -> int:
        """Two."""
        return x

    model = scripted()
    for tools in ([one], [one], [two]):
        await model.bind_tools(tools).ainvoke(QUESTION)
    assert len(model.moderator.calls) == 2


def test_an_engines_options_are_told_apart_and_stand_nowhere_to_be_read() -> None:
    """A server's key may be among them; caches keep a request's key, and tracers how a model was set up."""
    pytest.importorskip("torch")  # an engine that is given options is asked whether it has them
    far = "vllm-server:small@http://127.0.0.1:1/v1"
    one, other = (TTAChatModel(model=far, engine_options={"api_key": key}) for key in ("sk-one", "sk-other"))
    assert one._get_llm_string() != other._get_llm_string()
    assert "sk-one" not in one._get_llm_string() + repr(one) + dumps(one)


async def test_objects_that_cannot_be_told_apart_are_never_served_from_the_cache(cache: InMemoryCache) -> None:
    class Nameless:
        """Has an address only, which another object may get when this one is gone."""

        __slots__ = ("calls", "default_threshold", "name")

        def __init__(self) -> None:
            self.calls, self.name, self.default_threshold = 0, "nameless", 0.5

        async def moderate(self, texts: Any, *, prompt: str | None = None) -> Any:
            self.calls += 1
            return await ScriptedModerator().moderate(texts)

        async def aclose(self) -> None: ...

    moderator = Nameless()
    model = scripted(moderator=moderator)
    for _ in range(2):
        await model.ainvoke(QUESTION)
    assert (moderator.calls, kept(cache)) == (2, 0)


@pytest.mark.slow
def test_an_object_means_something_else_in_another_process() -> None:
    code = (
        "from tta_middleware import TTAChatModel\n"
        "from tta_middleware.testing.scripted_engine import ScriptedEngine\n"
        "from tta_middleware.testing.scripted_moderator import ScriptedModerator\n"
        "model = TTAChatModel(model=ScriptedEngine('x'), moderator=ScriptedModerator())\n"
        "print(model._get_llm_string(), TTAChatModel(model='nowhere')._get_llm_string(), sep='\\n')"
    )
    (one, name), (other, same_name) = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
        for _ in range(2)
    ]
    assert one != other
    assert name == same_name


async def test_the_guard_around_another_model_keeps_no_blocked_answer(cache: InMemoryCache) -> None:
    inner = FakeListChatModel(responses=["Then flagme, yes.", CALM])
    model = GuardedChatModel(inner=inner, moderator=ScriptedModerator())
    assert [(await model.ainvoke(QUESTION)).text for _ in range(3)] == [Policy().notice, CALM, CALM]
    assert kept(cache) == 1


async def test_the_guard_around_another_model_has_a_key_of_its_own_per_moderator(cache: InMemoryCache) -> None:
    inner = FakeListChatModel(responses=["A middling answer."])
    lax, strict = (ScriptedModerator(score=lambda _, at=at: {"violence": at}) for at in (0.4, 0.6))
    assert (await GuardedChatModel(inner=inner, moderator=lax).ainvoke(QUESTION)).text == "A middling answer."
    assert (await GuardedChatModel(inner=inner, moderator=strict).ainvoke(QUESTION)).text == Policy().notice
    lax.default_threshold = 0.3
    assert (await GuardedChatModel(inner=inner, moderator=lax).ainvoke(QUESTION)).text == Policy().notice


def test_the_cache_is_still_the_users(cache: InMemoryCache) -> None:
    assert isinstance(scripted(cache=cache).cache, BaseCache)
    assert scripted(cache=cache).cache is cache
