"""What users hand in as fallbacks, moderators and text, and calls from where they cannot be waited for."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.runnables import RunnableLambda
from pydantic import ValidationError

from tta_middleware import TTAChatModel
from tta_middleware.errors import ConfigurationError
from tta_middleware.guard.guard import Guard
from tta_middleware.policy import DEFAULT_NOTICE
from tta_middleware.testing.scripted_engine import ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator
from tta_middleware.types import Message, Verdict

QUESTION = "How are you?"
INSTEAD = "Let us talk about gardens."


def blocking(fallback: Any, **settings: Any) -> TTAChatModel:
    defaults: dict[str, Any] = {"model": ScriptedEngine("Then flagme, yes."), "moderator": ScriptedModerator()}
    return TTAChatModel(**(defaults | settings), method="none", fallback=fallback)


class Fallbacks:
    def method(self, messages: Any) -> str:
        return INSTEAD

    async def coroutine(self, messages: Any) -> AIMessage:
        return AIMessage(INSTEAD)

    def __call__(self, messages: Any) -> HumanMessage:
        return HumanMessage([{"type": "text", "text": INSTEAD}])


async def coroutine(messages: Any) -> str:
    return INSTEAD


FALLBACKS = [
    lambda messages: INSTEAD,
    lambda messages: AIMessage(INSTEAD),
    lambda messages: coroutine(messages),
    lambda messages: Message("assistant", INSTEAD),
    coroutine,
    Fallbacks().method,
    Fallbacks().coroutine,
    Fallbacks(),
    RunnableLambda(lambda messages: INSTEAD),
]


@pytest.mark.parametrize("fallback", FALLBACKS)
async def test_a_fallback_may_be_any_function_and_give_a_text_or_a_message(fallback: Any) -> None:
    model = blocking(fallback)
    assert (await model.ainvoke(QUESTION)).text == INSTEAD
    assert model.invoke(QUESTION).text == INSTEAD
    assert "".join([chunk.text async for chunk in model.astream(QUESTION)]) == INSTEAD
    assert (await blocking("refuse").ainvoke(QUESTION, fallback=fallback)).text == INSTEAD


async def test_an_ordinary_function_runs_beside_the_loop_and_may_ask_a_model_in_turn() -> None:
    other = TTAChatModel(model=ScriptedEngine(INSTEAD), moderator=ScriptedModerator())
    threads: list[int] = []

    def ask(messages: Any) -> AIMessage:
        threads.append(threading.get_ident())
        return other.invoke("Say something else.")

    assert (await blocking(ask).ainvoke(QUESTION)).text == INSTEAD
    assert blocking(ask).invoke(QUESTION).text == INSTEAD
    assert threading.get_ident() not in threads


async def test_what_a_fallback_says_is_checked_whatever_it_is() -> None:
    for fallback in (lambda messages: "flagme", lambda messages: AIMessage("flagme")):
        assert (await blocking(fallback).ainvoke(QUESTION)).text == DEFAULT_NOTICE
    with pytest.raises(ConfigurationError, match="gives a text or a message, not NoneType"):
        await blocking(lambda messages: None).ainvoke(QUESTION)


class OnlyModerate:
    """What the README asks for."""

    async def moderate(self, texts: list[str]) -> list[Verdict]:
        return [Verdict({"violence": 0.9 if "flagme" in text else 0.1}, False, "mine") for text in texts]


class Ordinary:
    """Not even async; named, with a threshold and a way to close it."""

    name = "ordinary"
    default_threshold = 0.05
    closed = 0

    def moderate(self, texts: list[str], *, prompt: str | None = None) -> list[Verdict]:
        self.thread, self.prompt = threading.get_ident(), prompt
        return [Verdict({"violence": 0.1}, False, "mine") for _ in texts]

    def aclose(self) -> None:
        self.closed += 1


async def test_any_object_with_an_async_moderate_is_a_moderator() -> None:
    calm = TTAChatModel(model=ScriptedEngine(INSTEAD), moderator=OnlyModerate())
    answer = await calm.ainvoke(QUESTION)
    assert (answer.text, answer.response_metadata["tta"]["moderator"]) == (INSTEAD, "OnlyModerate")
    assert (await blocking("refuse", moderator=OnlyModerate()).ainvoke(QUESTION)).text == DEFAULT_NOTICE
    await calm.aclose()


async def test_an_ordinary_moderate_runs_in_a_thread_under_its_own_threshold() -> None:
    moderator = Ordinary()
    model = TTAChatModel(model=ScriptedEngine(INSTEAD), moderator=moderator, method="none")
    answer = await model.ainvoke(QUESTION)
    assert (answer.text, answer.response_metadata["tta"]["moderator"]) == (DEFAULT_NOTICE, "ordinary")
    assert moderator.thread != threading.get_ident()
    assert moderator.prompt == QUESTION


@pytest.mark.parametrize("moderator", [object(), OnlyModerate, 3, lambda texts: []])
def test_what_does_not_moderate_is_refused_at_once(moderator: Any) -> None:
    with pytest.raises(ValidationError, match=r"an object with moderate\(texts\)"):
        TTAChatModel(moderator=moderator)


LONE = "caf\u00e9 \ud83d and \ude00 end\ud800"
PAIR = "\ud83d\ude00"


@pytest.mark.parametrize("moderator", ["local", OnlyModerate()])
async def test_a_lone_surrogate_in_a_prompt_is_replaced(moderator: Any) -> None:
    heard: list[str] = []

    def script(call: Any) -> str:
        heard.append(call.text)
        return INSTEAD

    model = TTAChatModel(model=ScriptedEngine(script), moderator=moderator, prompt_check="all")
    for prompt in (LONE, [HumanMessage([{"type": "text", "text": LONE}])], PAIR):
        assert (await model.ainvoke(prompt)).text == INSTEAD
    assert heard == [*["caf\u00e9 \ufffd and \ufffd end\ufffd"] * 2, "\U0001f600"]
    guard = Guard(ScriptedEngine(script), ScriptedModerator())
    assert (await guard.answer([Message("system", LONE), Message("user", LONE)])).text == INSTEAD


async def test_a_lone_surrogate_reaches_neither_tokenizer_nor_history() -> None:
    model = TTAChatModel(max_new_tokens=3, dtype="float32")
    call = {"name": "look", "args": {"what\ud800": ["\ud800"]}, "id": "1"}
    history = [HumanMessage(LONE), AIMessage("", tool_calls=[call]), HumanMessage(LONE)]
    assert (await model.ainvoke(history)).usage_metadata
    await model.aclose()


async def test_a_sync_call_on_the_bridges_own_loop_says_what_to_write_instead_of_waiting_for_ever() -> None:
    other = TTAChatModel(model=ScriptedEngine(INSTEAD), moderator=ScriptedModerator())

    async def ask(messages: Any) -> str:
        return other.invoke("Say something else.").text

    with pytest.raises(ConfigurationError, match="await the async call, such as ainvoke"):
        blocking(ask).invoke(QUESTION)
    assert (await blocking(ask).ainvoke(QUESTION)).text == INSTEAD
