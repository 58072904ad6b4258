"""A model that thinks, as LangChain sees it: blocks, usage, tools, structured output, history, cache."""

from __future__ import annotations

from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.caches import InMemoryCache
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage
from langchain_core.tools import tool
from pydantic import ValidationError
from tta_langchain_agents import TTAMiddleware

from tta_middleware import TTAChatModel, Windows
from tta_middleware.errors import ConfigurationError
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging

THOUGHT = "They ask about the town. I know its harbour and its market, so I begin with these two."
ANSWER = "The old harbour town lies where the river meets the sea. Its market opens at dawn."
BLOCKS = [{"type": "reasoning", "reasoning": THOUGHT}, {"type": "text", "text": ANSWER}]
CALL = '<tool_call>\n{"name": "look_up", "arguments": {"what": "the harbour"}}\n</tool_call>'


def thinking(answer: str = ANSWER, thought: str = THOUGHT) -> Any:
    def script(call: ScriptedCall) -> str:
        _, closed, prefix = call.prefix.rpartition("</think>\n\n")
        return answer.removeprefix(prefix) if closed else f"<think>\n{thought}\n</think>\n\n{answer}"

    return script


def model(script: Any = None, **settings: Any) -> TTAChatModel:
    engine = ScriptedEngine(script or thinking(), thinking=True, template=("reasoning_effort",))
    words = ScriptedModerator(score=flagging("forbidden"))
    return TTAChatModel(model=engine, moderator=words, windows=Windows(first=20, largest=40), seed=1, **settings)


async def merged(chat: Any, asked: Any = "Hello") -> AIMessageChunk:
    whole: Any = None
    async for chunk in chat.astream(asked):
        whole = chunk if whole is None else whole + chunk
    return whole


@pytest.mark.parametrize("stream", [True, False])
async def test_thoughts_are_reasoning_blocks_and_the_content_is_the_answer(stream: bool) -> None:
    chat = model(reasoning="show")
    message: Any = await merged(chat) if stream else await chat.ainvoke("Hello")
    assert message.content == message.text == ANSWER
    assert message.content_blocks == BLOCKS
    usage = message.usage_metadata
    assert 20 < usage["output_token_details"]["reasoning"] < usage["output_tokens"]
    assert message.response_metadata["tta"]["reasoning"]["mode"] == "show"


@pytest.mark.parametrize("stream", [True, False])
async def test_blocks_as_content(stream: bool) -> None:
    chat = model(reasoning="show", output_version="v1")
    message: Any = await merged(chat) if stream else await chat.ainvoke("Hello")
    assert [{key: block[key] for key in block if key != "index"} for block in message.content] == BLOCKS
    assert message.text == ANSWER


@pytest.mark.parametrize("mode", ["hide", "off"])
@pytest.mark.parametrize("stream", [True, False])
async def test_thoughts_that_are_not_shown_are_nowhere(mode: Any, stream: bool) -> None:
    chat = model(reasoning=mode)
    message: Any = await merged(chat) if stream else await chat.ainvoke("Hello")
    assert message.content_blocks == BLOCKS[1:]
    assert THOUGHT[:20] not in str(message.model_dump())
    counted = message.usage_metadata.get("output_token_details", {}).get("reasoning", 0)
    assert (counted > 0) == (mode == "hide")


@pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainBetaWarning")
async def test_events_of_thoughts() -> None:
    chat = model(reasoning="show")
    chunks = [e["data"]["chunk"] async for e in chat.astream_events("Hello", version="v2") if "chunk" in e["data"]]
    assert "".join(chunk.additional_kwargs.get("reasoning_content", "") for chunk in chunks) == THOUGHT
    stream: Any = await chat.astream_events("Hello", version="v3")
    deltas = [event["delta"] async for event in stream if event["event"] == "content-block-delta"]
    assert "".join(delta.get("reasoning", "") for delta in deltas) == THOUGHT
    assert "".join(delta.get("text", "") for delta in deltas) == ANSWER


@tool
def look_up(what: str) -> str:
    """Looks something up."""
    return f"Of {what} nothing is known."


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("choice", ["auto", "any"])
async def test_tools_are_read_from_the_answer(choice: str, stream: bool) -> None:
    thought = f"I may call a tool: {CALL} would do."
    chat = model(thinking(CALL, thought), reasoning="show").bind_tools([look_up], tool_choice=choice)
    message: Any = await merged(chat) if stream else await chat.ainvoke("Hello")
    assert [(call["name"], call["args"]) for call in message.tool_calls] == [("look_up", {"what": "the harbour"})]
    # What has to be called is called at once.
    assert message.additional_kwargs.get("reasoning_content") == (thought if choice == "auto" else None)


async def test_structured_output_is_read_from_the_answer() -> None:
    chat = model(thinking('{"place": "harbour"}', 'Perhaps {"place": "market"}?'), reasoning="show")
    asked = chat.with_structured_output({"title": "Place", "type": "object"}, method="json_mode")
    assert await asked.ainvoke("Hello") == {"place": "harbour"}


async def test_earlier_thoughts_reach_the_engine_apart_from_the_answer() -> None:
    seen: list[Any] = []

    class Spy(ScriptedEngine):
        async def embed(self, messages: Any, **more: Any) -> Any:
            seen[:] = messages
            return await super().embed(messages, **more)

    chat = TTAChatModel(model=Spy(ANSWER, thinking=True), moderator=ScriptedModerator())
    for earlier in (
        AIMessage(ANSWER, additional_kwargs={"reasoning_content": THOUGHT}),
        AIMessage(BLOCKS),
        AIMessage([{"type": "thinking", "thinking": THOUGHT}, BLOCKS[1]]),
    ):
        await chat.ainvoke([HumanMessage("Hello"), earlier, HumanMessage("And?")])
        assert (seen[1].content, seen[1].reasoning) == (ANSWER, THOUGHT)


async def test_what_is_cached_knows_what_became_of_thoughts() -> None:
    cache = InMemoryCache()
    shown, hidden = (model(reasoning=mode, cache=cache) for mode in ("show", "hide"))
    first = await shown.ainvoke("Hello")
    assert (await hidden.ainvoke("Hello")).content_blocks == BLOCKS[1:]
    assert (await shown.ainvoke("Hello")).content_blocks == first.content_blocks == BLOCKS


async def test_an_answer_that_never_came_is_not_cached() -> None:
    chat = model(cache=InMemoryCache(), max_new_tokens=10)
    message = await chat.ainvoke("Hello")
    about = message.response_metadata
    assert (message.text, about["finish_reason"], about["tta"]["outcome"]) == ("", "length", "unanswered")
    steps = chat.model.steps
    await chat.ainvoke("Hello")
    assert chat.model.steps > steps


async def test_thoughts_are_cut_where_the_call_says() -> None:
    message = await model().ainvoke("Hello", max_reasoning_tokens=8, reasoning="show")
    assert message.text == ANSWER
    assert THOUGHT.startswith(message.content_blocks[0]["reasoning"])
    assert message.response_metadata["tta"]["reasoning"]["closed"] == "too long"


async def test_batches_keep_each_answers_thoughts() -> None:
    def script(call: ScriptedCall) -> str:
        return f"<think>{THOUGHT} {call.text}</think>{ANSWER}"

    chat = model(script, reasoning="show")
    asked = ["one", "two", "three"]
    answers = await chat.abatch(asked)
    assert [answer.content_blocks[0]["reasoning"] for answer in answers] == [f"{THOUGHT} {text}" for text in asked]
    done = {index: answer async for index, answer in chat.abatch_as_completed(asked)}
    assert [done[index].content_blocks[0]["reasoning"] for index in range(3)] == [f"{THOUGHT} {t}" for t in asked]


async def test_an_agent_under_the_middleware_keeps_reasoning_blocks() -> None:
    middleware = TTAMiddleware(moderator=ScriptedModerator(score=flagging("forbidden")))
    agent: Any = create_agent(model(reasoning="show"), [], middleware=[middleware])
    message = (await agent.ainvoke({"messages": [HumanMessage("Hello")]}))["messages"][-1]
    assert message.content_blocks == BLOCKS


async def test_settings_are_checked() -> None:
    with pytest.raises(ValidationError, match="reasoning"):
        model(reasoning="loud")
    with pytest.raises(ConfigurationError, match="chat_template_kwargs"):
        await model().ainvoke("Hello", enable_thinking=False)
    assert (await model(chat_template_kwargs={"reasoning_effort": "low"}).ainvoke("Hello")).text == ANSWER
    with pytest.raises(ConfigurationError, match="builtin_tools"):
        await model(chat_template_kwargs={"builtin_tools": []}).ainvoke("Hello")
