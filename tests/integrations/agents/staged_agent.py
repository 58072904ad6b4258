"""A guarded agent's parts, staged, for several test modules."""

from __future__ import annotations

import asyncio
from typing import Any

from langchain.tools import ToolRuntime
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.tools import tool
from langgraph.types import Command
from tta_langchain_agents import TTAMiddleware

from tta_middleware import TTAChatModel
from tta_middleware.testing.scripted_engine import ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator

HELLO = {"messages": [("user", "hello")]}
BAD = "This is flagme."


def guard(**settings: Any) -> TTAMiddleware:
    return TTAMiddleware(ScriptedModerator(), **settings)


def call(name: str = "look_up", **args: Any) -> AIMessage:
    return AIMessage("", tool_calls=[{"name": name, "args": args, "id": "call-1", "type": "tool_call"}])


def local_model(script: str = "A kind word.", **settings: Any) -> TTAChatModel:
    return TTAChatModel(model=ScriptedEngine(script), moderator=ScriptedModerator(), method="none", **settings)


@tool
def look_up(word: str) -> str:
    """Look a word up."""
    return f"{word} means well"


@tool("look_up")
def look_up_or_worse(word: str) -> str:
    """Look a word up; a bad one has a bad meaning."""
    return f"{word} means flagme" if word == "bad" else f"{word} means well"


@tool
def updates(word: str, runtime: ToolRuntime) -> Command[Any]:
    """Updates the state."""
    return Command(update={"messages": [ToolMessage("flagme", tool_call_id=runtime.tool_call_id, id="result")]})


async def both_ways(run: Any, given: Any = HELLO) -> None:
    """Once async and once sync; the script's last answer holds for both."""
    await run.agent.ainvoke(given, run.config)
    await asyncio.to_thread(run.agent.invoke, given, run.config)
