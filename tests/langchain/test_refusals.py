"""Blocked answers as LangChain knows refusals: the block, the error, and what LangChain's own parts do with them."""

from __future__ import annotations

import pickle
from functools import reduce
from operator import add
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import ModelFallbackMiddleware, ModelRefusalMiddleware
from langchain_core.exceptions import ContextOverflowError, ModelRefusalError
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_core.messages import AIMessage
from pydantic import BaseModel
from tta_langchain_agents import GuardedChatModel

from tta_middleware import TTAChatModel
from tta_middleware.assembly import Runtime
from tta_middleware.chat_model.refusal import RefusedAnswerError
from tta_middleware.errors import ContextLengthError, UnsafeAnswerError
from tta_middleware.policy import DEFAULT_NOTICE, Policy
from tta_middleware.testing.scripted_engine import ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator

QUESTION = "How are you?"
LATE = "A calm beginning that goes on for quite a while before it turns, and then flagme, yes."
BLOCK = {"type": "refusal", "refusal": DEFAULT_NOTICE}


def scripted(script: Any = "Then flagme, yes.", **settings: Any) -> TTAChatModel:
    defaults = {"model": ScriptedEngine(script), "moderator": ScriptedModerator(), "method": "none"}
    return TTAChatModel(**(defaults | settings))


async def answers(model: TTAChatModel) -> list[AIMessage]:
    return [
        model.invoke(QUESTION),
        await model.ainvoke(QUESTION),
        reduce(add, model.stream(QUESTION)),
        reduce(add, [chunk async for chunk in model.astream(QUESTION)]),
    ]


@pytest.mark.parametrize("version", ["v0", "v1"])
async def test_a_blocked_message_carries_the_standard_block_and_its_text(version: str) -> None:
    for message in await answers(scripted(output_version=version)):
        assert [block for block in message.content_blocks if block["type"] == "refusal"] in (
            [BLOCK],
            [{**BLOCK, "index": 1}],
        )
        assert message.text == DEFAULT_NOTICE
        assert message.response_metadata["normalized_finish_reason"] == "content_filter"
        assert isinstance(message.content, str) == (version == "v0")


async def test_what_a_late_block_refuses_is_the_notice_and_not_what_had_left() -> None:
    message = reduce(add, [chunk async for chunk in scripted(LATE).astream(QUESTION)])
    assert message.text.startswith("A calm beginning")
    assert message.content_blocks[-1] == BLOCK


async def test_an_answer_is_no_refusal_and_neither_is_a_fallbacks_own() -> None:
    async def instead(_: Any) -> str:
        return "Let us talk about gardens."

    for model, reason in ((scripted("A calm answer."), "stop"), (scripted(fallback=instead), "content_filter")):
        for message in await answers(model):
            assert {block["type"] for block in message.content_blocks} == {"text"}
            assert message.response_metadata["normalized_finish_reason"] == reason


async def test_a_notice_of_the_policy_is_what_the_block_says() -> None:
    message = await scripted().ainvoke(QUESTION, policy=Policy(notice="Not today."))
    assert message.content_blocks[-1] == {"type": "refusal", "refusal": "Not today."}


async def test_the_error_is_one_of_both_trees_and_travels() -> None:
    model = scripted(fallback="raise")
    with pytest.raises(UnsafeAnswerError) as ours:
        await model.ainvoke(QUESTION)
    with pytest.raises(ModelRefusalError) as theirs:
        [chunk async for chunk in model.astream(QUESTION)]
    with pytest.raises(ModelRefusalError):
        model.invoke(QUESTION)
    for error in (ours.value, theirs.value):
        assert isinstance(error, RefusedAnswerError)
        copy = pickle.loads(pickle.dumps(error))
        assert (str(copy), copy.trace) == (str(error), error.trace)
        assert copy.raw_message == error.raw_message
        assert error.raw_message is not None
        assert error.raw_message.content_blocks[-1] == BLOCK


async def test_with_fallbacks_hands_over_to_the_next_model() -> None:
    model = scripted(fallback="raise").with_fallbacks([scripted("The other's answer.")])
    narrow = scripted(fallback="raise").with_fallbacks(
        [scripted("The other's answer.")], exceptions_to_handle=(ModelRefusalError,)
    )
    for chain in (model, narrow):
        assert chain.invoke(QUESTION).text == "The other's answer."
        assert (await chain.ainvoke(QUESTION)).text == "The other's answer."
        assert reduce(add, chain.stream(QUESTION)).text == "The other's answer."
        assert reduce(add, [chunk async for chunk in chain.astream(QUESTION)]).text == "The other's answer."


@pytest.mark.parametrize("fallback", ["refuse", "raise"])
async def test_an_agents_own_fallback_takes_over_from_a_block(fallback: str) -> None:
    second = FakeListChatModel(responses=["The other's answer."])
    agent = create_agent(
        scripted(fallback=fallback), [], middleware=[ModelFallbackMiddleware(second), ModelRefusalMiddleware()]
    )
    turn: Any = {"messages": [("user", QUESTION)]}
    assert agent.invoke(turn)["messages"][-1].text == "The other's answer."
    assert (await agent.ainvoke(turn))["messages"][-1].text == "The other's answer."


async def test_an_agent_that_treats_refusals_as_errors_raises() -> None:
    agent = create_agent(scripted(), [], middleware=[ModelRefusalMiddleware()])
    with pytest.raises(ModelRefusalError, match="I can't help"):
        await agent.ainvoke({"messages": [("user", QUESTION)]})


async def test_structured_output_of_a_blocked_answer_is_a_refusal_and_no_parsing_error() -> None:
    class Joke(BaseModel):
        """A joke."""

        setup: str

    for method in ("function_calling", "json_schema"):
        with pytest.raises(ModelRefusalError):
            await scripted().with_structured_output(Joke, method=method).ainvoke(QUESTION)


async def test_the_guard_around_another_model_raises_what_langchain_understands() -> None:
    inner = FakeListChatModel(responses=["Then flagme, yes."])
    guarded = GuardedChatModel(inner=inner, moderator=ScriptedModerator(), on_flagged="raise")
    chain = guarded.with_fallbacks([scripted("The other's answer.")], exceptions_to_handle=(ModelRefusalError,))
    assert (await chain.ainvoke(QUESTION)).text == "The other's answer."
    with pytest.raises(UnsafeAnswerError):
        guarded.invoke(QUESTION)


async def test_a_conversation_that_is_too_long_is_langchains_error_too(runtime: Runtime) -> None:
    pytest.importorskip("torch")
    model = TTAChatModel(dtype="float32", runtime=runtime)
    long = "word " * 9_000
    with pytest.raises(ContextOverflowError, match="too long") as raised:
        model.invoke(long)
    with pytest.raises(ContextOverflowError):
        async for _ in model.astream(long):
            pass
    assert isinstance(raised.value, ContextLengthError)
    again = pickle.loads(pickle.dumps(raised.value))
    assert (type(again), str(again)) == (type(raised.value), str(raised.value))
    assert model.with_fallbacks([scripted("Too long for that one.")]).invoke(long).text == "Too long for that one."
