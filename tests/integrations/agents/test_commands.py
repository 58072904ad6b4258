"""What a tool writes into the state: whatever becomes a message there is judged as one."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import pytest
from langchain.agents import AgentState
from langchain.tools import InjectedToolCallId
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    ChatMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.tools import BaseTool, ToolException, tool
from langgraph.errors import ParentCommand
from langgraph.graph import MessagesState, StateGraph
from langgraph.graph.message import add_messages
from langgraph.types import Command, Overwrite, interrupt
from pydantic import BaseModel
from tta_langchain_agents import TTAMiddleware
from tta_langchain_agents.middleware import TOOL_NOTICE

from tta_middleware.errors import UnsafeAnswerError
from tta_middleware.testing.scripted_moderator import ScriptedModerator

sys.path.insert(0, str(Path(__file__).parent))
from staged_agent import HELLO, both_ways, call, guard

pytestmark = [
    pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainBetaWarning"),
    pytest.mark.filterwarnings("ignore:astream_log is deprecated"),
]

BLOCKS = [{"type": "text", "text": "flagme"}]
CALLS = [{"name": "look_up", "args": {"word": "flagme"}, "id": "2", "type": "tool_call"}]

MESSAGES: dict[str, Any] = {
    "dict": {"role": "assistant", "content": "flagme"},
    "dict by type": {"type": "human", "content": "flagme"},
    "dict of blocks": {"role": "user", "content": BLOCKS},
    "dict with calls": {"role": "assistant", "content": "", "tool_calls": CALLS},
    "dict with more": {"role": "user", "content": "fine", "note": "flagme"},
    "dict of a tool": {"role": "tool", "content": "flagme", "tool_call_id": "9"},
    "tuple": ("ai", "flagme"),
    "system tuple": ("system", "flagme"),
    "string": "flagme",
    "constructor": {
        "lc": 1,
        "type": "constructor",
        "id": ["langchain", "schema", "messages", "AIMessage"],
        "kwargs": {"content": "flagme"},
    },
    "AIMessage": AIMessage("flagme", id="a"),
    "AIMessage with calls": AIMessage("", tool_calls=CALLS),
    "AIMessage that reasons": AIMessage([{"type": "reasoning", "reasoning": "flagme"}]),
    "AIMessageChunk": AIMessageChunk("flagme"),
    "HumanMessage": HumanMessage("flagme"),
    "HumanMessage that reasons": HumanMessage([{"type": "thinking", "thinking": "flagme"}]),
    "HumanMessage with a title": HumanMessage([{**BLOCKS[0], "text": "fine", "citations": [{"title": "flagme"}]}]),
    "HumanMessage with more": HumanMessage("fine", additional_kwargs={"note": "flagme"}),
    "HumanMessage with a name": HumanMessage("fine", name="flagme"),
    "HumanMessage with an attribute": HumanMessage("fine", note="flagme"),
    "SystemMessage": SystemMessage("flagme"),
    "ChatMessage": ChatMessage("flagme", role="critic"),
    "ToolMessage": ToolMessage("flagme", tool_call_id="9"),
    "ToolMessage that reasons": ToolMessage([{"type": "reasoning", "reasoning": "flagme"}], tool_call_id="9"),
}


def writes(update: Any, *, graph: str | None = None, asynchronous: bool = False) -> BaseTool:
    """A tool that gives back this update."""

    def give(tool_call_id: str) -> Any:
        return Command(update=update(tool_call_id) if callable(update) else update, graph=graph)

    @tool
    def note(word: str, tool_call_id: Annotated[str, InjectedToolCallId]) -> Any:
        """Take a note."""
        return give(tool_call_id)

    @tool("note")
    async def anote(word: str, tool_call_id: Annotated[str, InjectedToolCallId]) -> Any:
        """Take a note."""
        return give(tool_call_id)

    return anote if asynchronous else note


def beside_its_result(message: Any) -> Any:
    return lambda call_id: {"messages": [message, ToolMessage("noted", tool_call_id=call_id)]}


# An update is read the same way whoever wrote it: every message of a sync tool, two of an async one.
QUICK_ASYNC = {"dict", "AIMessage"}
WRITTEN = [
    pytest.param(
        message, asynchronous, id=f"{'async' if asynchronous else 'sync'}-{kind}",
        marks=[pytest.mark.slow] if asynchronous and kind not in QUICK_ASYNC else [],
    )
    for asynchronous in (False, True)
    for kind, message in MESSAGES.items()
]  # fmt: skip


@pytest.mark.parametrize(("message", "asynchronous"), WRITTEN)
async def test_whatever_becomes_a_message_is_judged(watched: Any, message: Any, asynchronous: bool) -> None:
    note = writes(beside_its_result(message), asynchronous=asynchronous)
    run = watched([call("note", word="x"), "done"], tools=[note], middleware=[guard()])
    await run.agent.ainvoke(HELLO, run.config)
    async for item in run.agent.astream(HELLO, run.config, stream_mode=["messages", "updates", "values"]):
        run.seen.append(item)
    assert not run.leaks()
    assert "withheld" in "".join(message.text for message in run.messages)
    assert "noted" in [message.text for message in run.messages]


async def test_a_flagged_message_of_the_models_kind_becomes_a_refusal(watched: Any) -> None:
    note = writes(beside_its_result(AIMessage("flagme", id="one")))
    run = watched([call("note", word="x"), "done"], tools=[note], middleware=[guard()])
    await run.agent.ainvoke(HELLO, run.config)
    (written,) = [message for message in run.messages if message.id == "one"]
    assert written.content_blocks[-1] == {"type": "refusal", "refusal": written.text}
    assert written.response_metadata["normalized_finish_reason"] == "content_filter"


@pytest.mark.parametrize(
    "kind", ["dict", "AIMessage", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("HumanMessage", "tuple"))]
)
async def test_it_is_nowhere_to_be_seen(watched: Any, surface: Any, kind: str) -> None:
    run = watched(
        [call("note", word="x"), "done"], tools=[writes(beside_its_result(MESSAGES[kind]))], middleware=[guard()]
    )
    await surface(run, HELLO)
    assert not run.leaks()
    assert run.messages[-1].text == "done"


def result(call_id: str) -> ToolMessage:
    return ToolMessage("noted", tool_call_id=call_id)


@dataclass
class Update:
    messages: Any


class Written:
    """LangGraph takes any object whose class has annotations."""

    messages: Any

    def __init__(self, messages: Any) -> None:
        self.messages = messages


class Named(NamedTuple):
    messages: Any


class Model(BaseModel):
    messages: Any
    notes: Any = None


UPDATES: dict[str, Any] = {
    "overwrite": lambda call_id: (("messages", Overwrite([("user", "hello"), ("ai", "flagme"), result(call_id)])),),
    "overwrite as JSON": lambda call_id: (("messages", {"__overwrite__": [AIMessage("flagme", id="a")]}),),
    "overwrite as typed JSON": lambda call_id: (
        ("messages", {"type": "__overwrite__", "value": [AIMessage("flagme", id="a")]}),
    ),
    "pairs": lambda call_id: (("messages", [AIMessage("flagme"), result(call_id)]),),
    "a dataclass": lambda call_id: Update([AIMessage("flagme"), result(call_id)]),
    "an object": lambda call_id: Written([AIMessage("flagme"), result(call_id)]),
    "a named tuple": lambda call_id: Named([AIMessage("flagme"), result(call_id)]),
    "a model": lambda call_id: Model(messages=[AIMessage("flagme"), result(call_id)]),
    "after all were removed": lambda call_id: {
        "messages": [RemoveMessage("__remove_all__"), HumanMessage("flagme"), call("note"), result("call-1")]
    },
    "messages under another key": lambda call_id: {"messages": [result(call_id)], "aside": [AIMessage("flagme")]},
    "a message under another key": lambda call_id: {"messages": [result(call_id)], "aside": AIMessage("flagme")},
}


class WithAside(AgentState[Any]):
    aside: Any
    notes: Any


@pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES.keys())
async def test_every_form_of_an_update_is_read(watched: Any, update: Any) -> None:
    run = watched(
        [call("note", word="x"), "done"], tools=[writes(update)], middleware=[guard()], state_schema=WithAside
    )
    async for item in run.agent.astream(HELLO, run.config, stream_mode="messages"):
        run.seen.append(item)
    assert not run.leaks()
    assert run.messages[-1].text == "done"


async def test_what_an_update_leaves_out_stays_as_it_was(watched: Any) -> None:
    note = writes(lambda call_id: Model(messages=[result(call_id)]))
    run = watched([call("note", word="x"), "done"], tools=[note], middleware=[guard()], state_schema=WithAside)
    assert (await run.agent.ainvoke({**HELLO, "notes": "kept"}, run.config))["notes"] == "kept"


async def test_a_graph_around_that_is_all_one_value_is_written_to(watched: Any) -> None:
    written = [AIMessage("flagme", id="1"), AIMessage("fine", id="2")]

    @tool
    def hand_over(word: str) -> Any:
        """Hand over to the graph around this agent."""
        raise ParentCommand(Command(update=written, graph=Command.PARENT))

    run = watched([call("hand_over", word="x"), "done"], tools=[hand_over], middleware=[guard()])
    graph = StateGraph(Annotated[list[Any], add_messages])
    inner = run.agent
    graph.add_node("agent", lambda messages, config: inner.invoke({"messages": messages}, config))
    graph.set_entry_point("agent")
    run.agent = graph.compile(checkpointer=run.saver)
    run.seen.append(await run.agent.ainvoke([("user", "hello")], run.config))
    assert [message.text for message in run.seen[-1]][1:] == [TOOL_NOTICE, "fine"]
    assert not run.leaks()


async def test_several_results_of_one_tool_are_judged(watched: Any) -> None:
    @tool
    def note(word: str, tool_call_id: Annotated[str, InjectedToolCallId]) -> Any:
        """Take a note."""
        return [Command(update={"messages": [("ai", "flagme")]}), result(tool_call_id)]

    run = watched([call("note", word="x"), "done"], tools=[note], middleware=[guard()])
    await both_ways(run)
    assert not run.leaks()


@pytest.mark.parametrize("raised", [False, True], ids=["returned", "raised"])
async def test_what_goes_to_a_parent_graph_is_judged(watched: Any, raised: bool) -> None:
    update = {"messages": [("ai", "flagme"), AIMessage("flagme too")]}

    @tool
    def hand_over(word: str) -> Any:
        """Hand over to the graph around this agent."""
        raise ParentCommand(Command(update=update, graph=Command.PARENT))

    tool_ = hand_over if raised else writes(update, graph=Command.PARENT)
    run = watched([call(tool_.name, word="x"), "done"], tools=[tool_], middleware=[guard()])
    graph = StateGraph(MessagesState)
    graph.add_node("agent", run.agent)
    graph.set_entry_point("agent")
    run.agent = graph.compile(checkpointer=run.saver)
    run.seen.append(await run.agent.ainvoke(HELLO, run.config))
    assert [message.text for message in run.messages][1:] == [TOOL_NOTICE] * 2
    assert not run.leaks()


async def test_a_message_that_passes_is_left_as_it_is(watched: Any) -> None:
    answer = AIMessage("fine words", id="mine", additional_kwargs={"note": "fine"}, name="critic")
    run = watched([call("note", word="x"), "done"], tools=[writes(beside_its_result(answer))], middleware=[guard()])
    await run.agent.ainvoke(HELLO, run.config)
    assert run.messages[2] == answer


async def test_what_is_no_message_is_an_error_without_its_words(watched: Any) -> None:
    run = watched([call("note", word="x")], tools=[writes({"messages": [{"flagme": "no role"}]})], middleware=[guard()])
    with pytest.raises(ToolException, match="no messages that LangChain can read"):
        await run.agent.ainvoke(HELLO, run.config)
    assert not run.leaks()


async def test_errors_behind_an_error_are_judged(watched: Any) -> None:
    @tool
    def breaks(word: str) -> str:
        """Breaks."""
        try:
            raise ValueError("flagme")
        except ValueError as error:
            raise ToolException("it broke") from error

    run = watched([call("breaks", word="x")], tools=[breaks], middleware=[guard()])
    with pytest.raises(ToolException, match="withheld"):
        await run.agent.ainvoke(HELLO, run.config)
    assert not run.leaks()


class TestNamedToBeChecked:
    """Artifacts and other keys of the state are left alone, unless they are named."""

    KEYS: ClassVar[dict[str, Any]] = {
        "text": "flagme",
        "nested": {"a": ["fine", {"b": "flagme"}]},
        "overwrite": Overwrite("flagme"),
        "dataclass": Update("flagme"),
        "escaped": '{"a": "\\u0066lagme"}',
    }

    @pytest.mark.parametrize("value", KEYS.values(), ids=KEYS.keys())
    async def test_a_key_of_the_state(self, watched: Any, value: Any) -> None:
        note = writes(lambda call_id: {"messages": [result(call_id)], "notes": value, "aside": "flagme is left alone"})
        middleware = TTAMiddleware(ScriptedModerator(), check_state=("notes",))
        run = watched([call("note", word="x"), "done"], tools=[note], middleware=[middleware], state_schema=WithAside)
        done = await run.agent.ainvoke(HELLO, run.config)
        assert "notes" not in done
        assert done["aside"] == "flagme is left alone"
        assert "withheld" in run.messages[2].text

    async def test_a_clean_key_is_written(self, watched: Any) -> None:
        note = writes(lambda call_id: {"messages": [result(call_id)], "notes": {"a": "fine"}})
        middleware = TTAMiddleware(ScriptedModerator(), check_state=("notes",))
        run = watched([call("note", word="x"), "done"], tools=[note], middleware=[middleware], state_schema=WithAside)
        assert (await run.agent.ainvoke(HELLO, run.config))["notes"] == {"a": "fine"}

    @pytest.mark.parametrize("checked", [False, True])
    async def test_artifacts(self, watched: Any, checked: bool) -> None:
        @tool(response_format="content_and_artifact")
        def finds(word: str) -> Any:
            """Finds something."""
            return "found", {"page": ["flagme"]}

        middleware = TTAMiddleware(ScriptedModerator(), check_artifacts=checked)
        run = watched([call("finds", word="x"), "done"], tools=[finds], middleware=[middleware])
        await both_ways(run)
        assert run.leaks() is not checked
        assert (run.messages[2].artifact is None) is checked

    async def test_raise_holds_for_them_too(self, watched: Any) -> None:
        note = writes(lambda call_id: {"messages": [result(call_id)], "notes": "flagme"})
        middleware = TTAMiddleware(ScriptedModerator(), check_state=("notes",), on_flagged="raise")
        run = watched([call("note", word="x")], tools=[note], middleware=[middleware], state_schema=WithAside)
        with pytest.raises(UnsafeAnswerError, match="state"):
            await run.agent.ainvoke(HELLO, run.config)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
async def test_what_a_tool_asks_a_person_is_judged(watched: Any, asynchronous: bool) -> None:
    @tool
    def asks(word: str) -> str:
        """Asks somebody."""
        return f"they said {interrupt({'question': ['flagme?']} if word == 'bad' else 'fine?')}"

    run = watched([call("asks", word="bad"), "done"], tools=[asks], middleware=[guard()])
    paused = (
        await run.agent.ainvoke(HELLO, run.config)
        if asynchronous
        else await asyncio.to_thread(run.agent.invoke, HELLO, run.config)
    )
    assert paused["__interrupt__"][0].value == TOOL_NOTICE
    assert not run.leaks()
    await run.agent.ainvoke(Command(resume="yes"), run.config)
    assert run.messages[2].text == "they said yes"
