"""What tools give back."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
from langchain.tools import InjectedState
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.tools import ToolException, tool
from langgraph.types import Command, interrupt
from tta_langchain_agents import TTAMiddleware
from tta_langchain_agents.middleware import TOOL_NOTICE
from tta_langchain_agents.testing import ScriptedChatModel

from tta_middleware.errors import UnsafeAnswerError
from tta_middleware.testing.scripted_moderator import ScriptedModerator

sys.path.insert(0, str(Path(__file__).parent))
from staged_agent import BAD, HELLO, both_ways, call, guard, look_up, look_up_or_worse, updates

pytestmark = [
    pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainBetaWarning"),
    pytest.mark.filterwarnings("ignore:astream_log is deprecated"),
]


@tool
def fails(word: str) -> str:
    """Fails."""
    raise ToolException(f"cannot do {word}")


@tool(response_format="content_and_artifact")
def finds(word: str) -> tuple[str, dict[str, str]]:
    """Finds something."""
    return f"found {word}", {"raw": f"page about {word}"}


@tool
def reads_state(word: str, state: Annotated[dict[str, Any], InjectedState]) -> str:
    """Reads the state."""
    return f"{word}: {len(state['messages'])} messages"


@tool
def asks(word: str) -> str:
    """Asks somebody."""
    return f"somebody said {interrupt(word)}"


@tool
async def asynchronous(word: str) -> str:
    """Asynchronous."""
    return f"{word} at last"


@tool
def talks(word: str) -> str:
    """Lets a model of its own talk."""
    return f"{ScriptedChatModel(answers=[BAD]).invoke(word).text[:4]} talked"


async def test_what_a_parser_makes_of_a_result_is_judged(watched: Any) -> None:
    @tool
    def look_up(word: str) -> str:
        """Look a word up; json.dumps writes everything but ASCII so."""
        return '{"meaning": "\\u0066lagme"}'

    run = watched([call(word="x"), "done"], tools=[look_up], middleware=[guard()])
    await both_ways(run)
    assert run.messages[2].text == TOOL_NOTICE
    assert not run.leaks("0066")


async def test_the_result_of_a_call_without_an_id_is_judged(watched: Any) -> None:
    asked = AIMessage("", tool_calls=[{"name": "look_up", "args": {"word": "bad"}, "id": None, "type": "tool_call"}])
    run = watched([asked], tools=[look_up_or_worse], middleware=[guard()])
    with pytest.raises(TypeError, match="unexpected type"):  # of LangGraph's, which makes no message of it
        await run.agent.ainvoke(HELLO, run.config)
    assert not run.leaks()


async def test_tool_calls_side_by_side_keep_their_results_apart(watched: Any) -> None:
    calls = [
        {"name": "look_up", "args": {"word": word}, "id": word, "type": "tool_call"}
        for word in ("one", "two", "flagged", "three")
    ]

    @tool
    def look_up(word: str) -> str:
        """Look a word up."""
        return "flagme" if word == "flagged" else word

    run = watched([AIMessage("", tool_calls=calls), "done"], tools=[look_up], middleware=[guard()])
    await both_ways(run)
    results = {message.tool_call_id: message.text for message in run.messages if isinstance(message, ToolMessage)}
    assert (results["one"], results["two"], results["three"]) == ("one", "two", "three")
    assert "withheld" in results["flagged"]
    assert not run.leaks()


class TestTools:
    async def test_an_update_of_the_state_is_checked(self, watched: Any) -> None:
        run = watched([call("updates", word="x"), "done"], tools=[updates], middleware=[guard()])
        await run.agent.ainvoke(HELLO, run.config)
        assert run.messages[2].id == "result"
        assert "withheld" in run.messages[2].text
        assert not run.leaks()

    @pytest.mark.parametrize("way", ["ainvoke", "invoke"])
    async def test_an_errors_text_is_checked(self, watched: Any, way: str) -> None:
        fails.handle_tool_error = False
        run = watched(
            [AIMessage("", tool_calls=[{"name": "fails", "args": {"word": "it"}, "id": "1"}])],
            tools=[fails],
            middleware=[guard()],
        )
        with pytest.raises(ToolException, match="cannot do it"):
            await run.agent.ainvoke(HELLO, run.config)

    async def test_a_flagged_error_is_not_heard_of(self, watched: Any) -> None:
        @tool
        def breaks(word: str) -> str:
            """Breaks."""
            raise ToolException("flagme")

        run = watched([call("breaks", word="it")], tools=[breaks], middleware=[guard()])
        with pytest.raises(ToolException, match="withheld"):
            await run.agent.ainvoke(HELLO, run.config)
        with pytest.raises(ToolException, match="withheld"):
            await asyncio.to_thread(run.agent.invoke, HELLO, run.config)
        assert not run.leaks()

    async def test_artifacts_go_with_their_content(self, watched: Any) -> None:
        run = watched([call("finds", word="trees"), "done"], tools=[finds], middleware=[guard()])
        await run.agent.ainvoke(HELLO, run.config)
        assert (run.messages[2].text, run.messages[2].artifact) == ("found trees", {"raw": "page about trees"})

    @pytest.mark.parametrize(
        ("name", "tool_", "text"),
        [("reads_state", reads_state, "x: 2 messages"), ("asynchronous", asynchronous, "x at last")],
    )
    async def test_injected_arguments_and_async_tools(self, watched: Any, name: str, tool_: Any, text: str) -> None:
        run = watched([call(name, word="x"), "done"], tools=[tool_], middleware=[guard()])
        await run.agent.ainvoke(HELLO, run.config)
        assert run.messages[2].text == text

    async def test_a_tool_may_interrupt(self, watched: Any) -> None:
        run = watched([call("asks", word="who?"), "done"], tools=[asks], middleware=[guard()])
        paused = await run.agent.ainvoke(HELLO, run.config)
        assert paused["__interrupt__"][0].value == "who?"
        await run.agent.ainvoke(Command(resume="me"), run.config)
        assert run.messages[2].text == "somebody said me"

    async def test_a_model_inside_a_tool_is_not_heard(self, watched: Any, surface: Any) -> None:
        run = watched([call("talks", word="x"), "done"], tools=[talks], middleware=[guard()])
        await surface(run, HELLO)
        assert run.messages[2].text == "This talked"
        assert not run.leaks()

    async def test_raise_holds_for_tool_results(self, watched: Any) -> None:
        run = watched([call("updates", word="x"), "done"], tools=[updates], middleware=[guard(on_flagged="raise")])
        with pytest.raises(UnsafeAnswerError, match="tool_result"):
            await run.agent.ainvoke(HELLO, run.config)
        assert not run.leaks()

    async def test_results_can_be_left_alone(self, watched: Any) -> None:
        moderator = ScriptedModerator()
        run = watched(
            [call("updates", word="x"), "done"],
            tools=[updates],
            middleware=[TTAMiddleware(moderator, check_tool_results=False)],
        )
        await run.agent.ainvoke(HELLO, run.config)
        assert run.messages[2].text == "flagme"

    async def test_an_unknown_tool_gets_the_usual_message(self, watched: Any) -> None:
        run = watched([call("nothing", word="x"), "done"], tools=[look_up], middleware=[guard()])
        await run.agent.ainvoke(HELLO, run.config)
        assert "not a valid tool" in run.messages[2].text
