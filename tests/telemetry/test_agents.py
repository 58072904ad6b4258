"""Spans of other models behind the guard in LangChain, alone and in an agent: the same as the guard's own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
import pytest
from langchain.agents import create_agent
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.language_models.fake_chat_models import FakeMessagesListChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.outputs import ChatGenerationChunk
from langchain_core.tools import tool
from memory import HARM, SAFE, Memory
from tta_langchain_agents import GuardedChatModel, TTAMiddleware

from tta_middleware import TTAChatModel, Windows
from tta_middleware.errors import UnsafeAnswerError
from tta_middleware.telemetry import instrument, uninstrument
from tta_middleware.testing.delays import Unequal, slow_even
from tta_middleware.testing.scripted_engine import ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging

WAYS = ("invoke", "stream", "ainvoke", "astream")


class Words(GenericFakeChatModel):
    """A model that says one text word by word, and breaks where it is told to."""

    text: str = SAFE
    messages: Iterator[Any] = iter(())

    def _message(self) -> AIMessage:
        usage = {"input_tokens": 9, "output_tokens": 21, "total_tokens": 30}
        return AIMessage(self.text, usage_metadata=usage, response_metadata={"finish_reason": "stop"})  # type: ignore[arg-type]

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        self.messages = iter([self._message()])
        return super()._generate(*args, **kwargs)

    def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
        for word in self.text.split(" "):
            yield ChatGenerationChunk(message=AIMessageChunk(f"{word} "))

    async def _astream(self, *args: Any, **kwargs: Any) -> AsyncIterator[ChatGenerationChunk]:
        for chunk in self._stream():
            yield chunk


def guarded(text: str = SAFE, **settings: Any) -> GuardedChatModel:
    moderator = Unequal(ScriptedModerator(score=flagging("forbidden")), slow_even)
    given = {"moderator": moderator, "release": Windows(first=20, largest=40), **settings}
    return GuardedChatModel(inner=Words(text=text), **given)


async def said(model: Any, way: str, asked: str = "secretword harbours?") -> str:
    match way:
        case "invoke":
            found: Any = await anyio.to_thread.run_sync(model.invoke, asked)
            return str(found.text)
        case "stream":
            chunks = await anyio.to_thread.run_sync(lambda: list(model.stream(asked)))
            return "".join(chunk.text for chunk in chunks)
        case "ainvoke":
            return str((await model.ainvoke(asked)).text)
    return "".join([chunk.text async for chunk in model.astream(asked)])


@pytest.mark.parametrize("way", WAYS)
async def test_an_answer_is_a_span_and_its_checks_are_children(memory: Memory, way: str) -> None:
    tracer = memory.tracers.get_tracer("test")
    with tracer.start_as_current_span("user") as user:
        assert (await said(guarded(), way)).strip() == SAFE
    [answer], checks = memory.named("chat"), memory.named("moderate ")
    assert answer.parent is not None
    assert answer.parent.span_id == user.get_span_context().span_id
    assert checks
    assert {check.parent.span_id for check in checks if check.parent} == {answer.context.span_id}
    about = memory.answer()
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "words",
        "gen_ai.response.finish_reasons": ("stop",),
        "tta.method": "block",
        "tta.outcome": "clean",
        "tta.moderation_calls": len(checks),
        "gen_ai.request.stream": "stream" in way,
    }
    assert {name: about.get(name) for name in expected} == expected
    assert ("gen_ai.response.time_to_first_chunk" in about) == ("stream" in way)
    ends = sorted((event.attributes or {}).get("tta.window.end", 0) for event in answer.events)
    assert ends[-1] == (len(f"{SAFE} ") if "stream" in way else 0)
    assert len(set(ends)) == len(ends)
    if way == "ainvoke":
        assert (about["gen_ai.usage.input_tokens"], about["gen_ai.usage.output_tokens"]) == (9, 21)
    assert memory.points("gen_ai.client.operation.duration")
    for word in ("secretword", "harbour", "lighthouse"):
        assert word not in memory.everything()


@pytest.mark.parametrize("way", WAYS)
async def test_a_block_is_an_answer_and_a_handed_over_one_has_the_other_s_span_inside(memory: Memory, way: str) -> None:
    await said(guarded(HARM), way)
    about = memory.answer()
    assert (about["tta.outcome"], about["gen_ai.response.finish_reasons"]) == ("blocked", ("content_filter",))
    assert about["tta.first.flagged"] is True
    assert "error.type" not in about
    memory.spans.clear()
    other = TTAChatModel(model=ScriptedEngine(SAFE), moderator=ScriptedModerator(), method="none")
    assert SAFE in await said(guarded(HARM, repair_model=other), way)
    inner, outer = memory.named("chat")
    assert inner.parent is not None
    assert inner.parent.span_id == outer.context.span_id
    outcomes = [(span.attributes or {})["tta.outcome"] for span in (outer, inner)]
    assert outcomes == ["blocked", "clean"]
    assert "forbidden" not in memory.everything()


async def test_errors_and_those_who_leave(memory: Memory) -> None:
    with pytest.raises(UnsafeAnswerError):
        await said(guarded(HARM, on_flagged="raise"), "ainvoke")
    assert memory.answer()["error.type"] == "RefusedAnswerError"
    memory.spans.clear()
    async for _ in guarded().astream("harbours?"):
        break
    await anyio.wait_all_tasks_blocked()
    memory.check_ends()


async def test_what_left_is_told_where_that_is_switched_on() -> None:
    told = Memory()
    instrument(capture_content=True, tracer_provider=told.tracers, meter_provider=told.meters)
    try:
        await said(guarded(), "astream")
        about = told.answer()
        await said(guarded(HARM), "astream")
    finally:
        uninstrument()
    assert "secretword" in about["gen_ai.input.messages"]
    assert "lighthouse" in about["gen_ai.output.messages"]
    assert "forbidden" not in told.everything()


@tool
def opening_hours(place: str) -> str:
    """When a place opens."""
    return f"The {place} opens at nine."


class Calls(FakeMessagesListChatModel):
    """A model that calls a tool, then answers."""

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self


def agent() -> Any:
    call = {"name": "opening_hours", "args": {"place": "harbour"}, "id": "c1"}
    answers = [AIMessage("", tool_calls=[call]), AIMessage("At nine, as the harbour says.")]
    middleware = TTAMiddleware(ScriptedModerator(score=flagging("forbidden")), check_prompt=True)
    return create_agent(Calls(responses=answers), [opening_hours], middleware=[middleware])


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
async def test_an_agent_s_models_prompts_and_tools_are_told(memory: Memory, way: str) -> None:
    tracer, asked = memory.tracers.get_tracer("test"), {"messages": [("user", "When does the secretword open?")]}
    with tracer.start_as_current_span("user") as user:
        found = agent().invoke(asked) if way == "invoke" else await agent().ainvoke(asked)
    assert found["messages"][-1].text == "At nine, as the harbour says."
    stages = [(span.attributes or {})["tta.moderation.stage"] for span in memory.named("moderate ")]
    assert {"prompt", "output", "tool_result"} <= set(stages)
    assert len(memory.named("chat")) == 2
    assert {span.context.trace_id for span in memory.spans} == {user.get_span_context().trace_id}
    assert {(point.attributes or {})["tta.moderation.stage"] for point in memory.points("tta.moderation.duration")} == {
        "prompt", "output", "tool_result"
    }  # fmt: skip
    assert "secretword" not in memory.everything()
