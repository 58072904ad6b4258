"""A moderator or a fallback that is LangChain's itself: what it is told and says is raw, and nobody around hears it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from langchain_core.callbacks import adispatch_custom_event, dispatch_custom_event
from langchain_core.language_models import FakeListChatModel
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnableLambda
from langchain_core.tracers.context import collect_runs
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.config import get_stream_writer
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.types import Command, interrupt

from tta_middleware import TTAChatModel
from tta_middleware.testing.scripted_engine import ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator
from tta_middleware.types import Verdict

BAD = "Between you and me: flagme."


class AsksAModel:
    """A moderator that has a chat model read each text."""

    name, default_threshold = "reader", 0.5

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        model = FakeListChatModel(responses=["read and flagme"])
        for text in texts:
            await model.ainvoke(f"Is this fine? {text}")
        return await ScriptedModerator().moderate(texts, prompt=prompt)


def model(**settings: Any) -> TTAChatModel:
    given = {"moderator": ScriptedModerator(), **settings}
    return TTAChatModel(model=ScriptedEngine(BAD), method="none", **given)


def says_it_raw() -> Runnable[Any, Any]:
    return FakeListChatModel(responses=[BAD])


async def asks_another(_: object) -> str:
    return str((await says_it_raw().ainvoke("hello")).text)


def asks_another_in_a_thread(_: object) -> str:
    return str(says_it_raw().invoke("hello").text)


def graph_of(node: Runnable[Any, Any], **settings: Any) -> Any:
    async def speak(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await node.ainvoke(state["messages"])]}

    graph = StateGraph(MessagesState)
    graph.add_node("speak", speak)
    graph.add_edge(START, "speak")
    return graph.compile(**settings)


def _as_state(messages: Any) -> dict[str, Any]:
    return {"messages": messages}


def _last(state: dict[str, Any]) -> Any:
    return state["messages"][-1]


PARTS: dict[str, Callable[[], TTAChatModel]] = {
    "moderator": lambda: model(moderator=AsksAModel()),
    "runnable": lambda: model(fallback=says_it_raw()),
    "function": lambda: model(fallback=asks_another),
    "sync function": lambda: model(fallback=asks_another_in_a_thread),
    "graph": lambda: model(fallback=RunnableLambda(_as_state) | graph_of(says_it_raw()) | _last),
}


async def chain_events(guarded: TTAChatModel) -> list[Any]:
    chain = ChatPromptTemplate.from_messages([("user", "{q}")]) | guarded
    return [event async for event in chain.astream_events({"q": "hello"}, version="v2")]


async def chain_runs(guarded: TTAChatModel) -> list[Any]:
    chain = RunnableLambda(lambda q: q) | guarded
    with collect_runs() as runs:
        await chain.ainvoke("hello")
        await asyncio.to_thread(chain.invoke, "hello")
        assert [chunk async for chunk in chain.astream("hello")]
    # How a model was set up is told as well, a staged engine's script with it.
    return [one.model_dump(exclude={"serialized"}) for run in runs.traced_runs for one in (run, *_further_in(run))]


def _further_in(run: Any) -> list[Any]:
    return [one for child in run.child_runs for one in (child, *_further_in(child))]


async def graph_stream(guarded: TTAChatModel) -> list[Any]:
    saver = InMemorySaver()
    graph, thread = graph_of(guarded, checkpointer=saver), {"configurable": {"thread_id": "one"}}
    modes = ["messages", "updates", "values", "debug", "tasks", "checkpoints"]
    given: Any = {"messages": [("user", "hello")]}
    shown = [item async for item in graph.astream(given, thread, stream_mode=modes, subgraphs=True)]
    words = "".join(item[2][0].text for item in shown if item[1] == "messages")
    return [*shown, words, dict(saver.blobs), dict(saver.writes), list(saver.list(None))]


@pytest.mark.parametrize("heard", [chain_events, chain_runs, graph_stream], ids=["events", "runs", "graph"])
@pytest.mark.parametrize("part", PARTS)
async def test_nobody_hears_what_a_part_of_a_guard_is_told_and_says(part: str, heard: Any) -> None:
    found = repr(await heard(PARTS[part]()))
    assert "hello" in found
    assert "flagme" not in found


async def sends_an_event(_: object) -> str:
    await adispatch_custom_event("asked", {"for": "flagme"})
    return "Please ask a librarian."


def sends_an_event_from_a_thread(_: object) -> str:
    dispatch_custom_event("asked", {"for": "flagme"})
    return "Please ask a librarian."


@pytest.mark.parametrize("fallback", [sends_an_event, sends_an_event_from_a_thread], ids=["async", "sync"])
async def test_an_event_that_a_part_sends_is_heard_by_nobody_and_no_error(fallback: Any) -> None:
    events = await chain_events(model(fallback=fallback))
    assert "asked" not in {event["name"] for event in events}
    assert "Please ask a librarian." in repr(events[-1])
    assert (await model(fallback=fallback).ainvoke("hello")).text == "Please ask a librarian."


async def writes_to_the_custom_stream(_: object) -> str:
    get_stream_writer()("asked a librarian")
    return "Please ask a librarian."


async def test_what_a_part_writes_to_the_custom_stream_by_its_own_hand_is_there() -> None:
    graph = graph_of(model(fallback=writes_to_the_custom_stream), checkpointer=InMemorySaver())
    given: Any = {"messages": [("user", "hello")]}
    thread: Any = {"configurable": {"thread_id": "one"}}
    assert [one async for one in graph.astream(given, thread, stream_mode="custom")] == ["asked a librarian"]


async def asks_a_person(_: object) -> str:
    return f"They say: {interrupt('What would you say?')}"


def asks_a_person_from_a_thread(_: object) -> str:
    return f"They say: {interrupt('What would you say?')}"


@pytest.mark.parametrize("fallback", [asks_a_person, asks_a_person_from_a_thread], ids=["async", "sync"])
async def test_a_part_may_ask_a_person(fallback: Any) -> None:
    graph = graph_of(model(fallback=fallback), checkpointer=InMemorySaver())
    thread: Any = {"configurable": {"thread_id": "one"}}
    paused = await graph.ainvoke({"messages": [("user", "hello")]}, thread)
    assert paused["__interrupt__"][0].value == "What would you say?"
    assert (await graph.ainvoke(Command(resume="Good day."), thread))["messages"][-1].text == "They say: Good day."


async def test_what_comes_of_it_is_heard() -> None:
    """The answer, and the repair's events, which belong to the run around."""
    guarded = TTAChatModel(model=ScriptedEngine(BAD), moderator=AsksAModel(), method="noise", budget={"generations": 3})
    events = await chain_events(guarded)
    assert "tta_repair_finished" in {event["name"] for event in events}
    assert any(event["event"] == "on_chat_model_end" for event in events)
