"""Agents that are tools of another agent: what their models say raw is no part of what the one around lets out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.tools import BaseTool, tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.config import get_stream_writer
from langgraph.types import Command, interrupt
from tta_langchain_agents.testing import ScriptedChatModel

sys.path.insert(0, str(Path(__file__).parent))
from staged_agent import call, guard

pytestmark = pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainBetaWarning")

MODES = ["values", "updates", "messages", "tasks", "debug", "checkpoints", "custom", "tools"]
TALKATIVE = "Between you and me: flagme."


def asks_a_subagent(subagent: Any, *, asynchronous: bool) -> BaseTool:
    """A tool that gives back how much another agent said."""

    def counted(state: Any) -> str:
        return f"It said {len(state['messages'][-1].text)} characters."

    @tool
    def ask(word: str) -> str:
        """Ask the other one."""
        return counted(subagent.invoke({"messages": [("user", word)]}))

    @tool("ask")
    async def ask_async(word: str) -> str:
        """Ask the other one."""
        return counted(await subagent.ainvoke({"messages": [("user", word)]}))

    return ask_async if asynchronous else ask


def around(tools: list[Any], *script: Any, **settings: Any) -> Any:
    return create_agent(
        ScriptedChatModel(answers=[*script, "Done."]),
        tools,
        middleware=[guard(**settings)],
        checkpointer=InMemorySaver(),
    )


def agent_with(subagent: Any, *, asynchronous: bool = False, **settings: Any) -> Any:
    return around([asks_a_subagent(subagent, asynchronous=asynchronous)], call("ask", word="hello"), **settings)


def talkative(**settings: Any) -> Any:
    return create_agent(ScriptedChatModel(answers=[TALKATIVE]), [], **settings)


THREAD: Any = {"configurable": {"thread_id": "one"}}
GIVEN: Any = {"messages": [("user", "hello")]}


async def streamed(agent: Any, way: str) -> str:
    """All that a way to stream an agent with its subgraphs shows."""
    if way == "sync":
        return repr(list(agent.stream(GIVEN, THREAD, stream_mode=MODES, subgraphs=True)))
    if way == "async":
        return repr([item async for item in agent.astream(GIVEN, THREAD, stream_mode=MODES, subgraphs=True)])
    version: Any = way
    events = agent.astream_events(GIVEN, THREAD, version=version, **({} if way == "v3" else {"subgraphs": True}))
    return repr([event async for event in (await events if way == "v3" else events)])


# LangGraph runs no async tool in a sync stream.
@pytest.mark.parametrize(
    ("way", "asynchronous"),
    [("sync", False), *((way, tool) for way in ("async", "v2", "v3") for tool in (False, True))],
)
async def test_streams_with_subgraphs_show_nothing_raw(way: str, asynchronous: bool) -> None:
    shown = await streamed(agent_with(talkative(), asynchronous=asynchronous), way)
    assert "It said 27 characters." in shown
    assert "flagme" not in shown


async def test_without_checks_of_tools_they_show_it() -> None:
    """As the documentation says of that setting; and so the test above would see it."""
    assert "flagme" in await streamed(agent_with(talkative(), check_tool_results=False), "async")


async def test_a_subagent_without_checkpoints_leaves_none() -> None:
    agent = agent_with(talkative(checkpointer=False))
    await agent.ainvoke(GIVEN, THREAD)
    stored = repr(
        (dict(agent.checkpointer.blobs), dict(agent.checkpointer.writes), list(agent.checkpointer.list(None)))
    )
    assert "It said 27 characters." in stored
    assert "flagme" not in stored


async def test_a_subagent_still_asks_a_person_and_writes_to_the_custom_stream() -> None:
    @tool
    def asks(word: str) -> str:
        """Asks a person."""
        get_stream_writer()("asking")
        return str(interrupt(f"May I {word}?"))

    inner = create_agent(ScriptedChatModel(answers=[call("asks", word="go on"), TALKATIVE]), [asks])
    agent = agent_with(inner, asynchronous=True)
    first = [item async for item in agent.astream(GIVEN, THREAD, stream_mode=["custom", "updates"], subgraphs=True)]
    assert "asking" in repr(first)
    assert "May I go on?" in repr(first[-1])
    rest = [item async for item in agent.astream(Command(resume="yes"), THREAD, stream_mode="updates", subgraphs=True)]
    assert "It said 27 characters." in repr(rest)
    assert "flagme" not in repr(rest)
