"""Every message of a run is checked, whoever wrote it, and each only once."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest
from langchain.agents.middleware import AgentMiddleware, SummarizationMiddleware, hook_config
from langchain.agents.middleware.types import ExtendedModelResponse, ModelResponse
from langchain.agents.structured_output import ToolStrategy
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langgraph.types import Command
from pydantic import BaseModel
from tta_langchain_agents import TTAMiddleware
from tta_langchain_agents.middleware import TOOL_NOTICE
from tta_langchain_agents.testing import ScriptedChatModel

from tta_middleware.errors import ModerationUnavailableError, UnsafeAnswerError
from tta_middleware.policy import DEFAULT_NOTICE
from tta_middleware.testing.scripted_moderator import ScriptedModerator

sys.path.insert(0, str(Path(__file__).parent))
from staged_agent import BAD, HELLO, both_ways, call, guard, local_model, look_up

pytestmark = [
    pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainBetaWarning"),
    pytest.mark.filterwarnings("ignore:astream_log is deprecated"),
]


class Speaks(AgentMiddleware[Any, Any, Any]):
    """Says something by itself, in one of its hooks."""

    def __init__(self, message: Any = None) -> None:
        super().__init__()
        self.message = message or AIMessage(BAD, id="own")

    def said(self) -> Any:
        return self.message.model_copy(deep=True)


class InsteadOfTheModel(Speaks):
    def wrap_model_call(self, request: Any, handler: Any) -> Any:
        return self.said()

    async def awrap_model_call(self, request: Any, handler: Any) -> Any:
        return self.said()


class BesideTheModel(Speaks):
    def wrap_model_call(self, request: Any, handler: Any) -> Any:
        return ExtendedModelResponse(handler(request), Command(update={"messages": [self.said()]}))

    async def awrap_model_call(self, request: Any, handler: Any) -> Any:
        return ExtendedModelResponse(await handler(request), Command(update={"messages": [self.said()]}))


class BeforeTheModel(Speaks):
    @hook_config(can_jump_to=["end"])
    def before_model(self, state: Any, runtime: Any) -> Any:
        return {"messages": [self.said()], "jump_to": "end"}


class BeforeTheAgent(Speaks):
    @hook_config(can_jump_to=["end"])
    def before_agent(self, state: Any, runtime: Any) -> Any:
        return {"messages": [self.said()], "jump_to": "end"}


class BeforeTheAgentOnly(Speaks):
    def before_agent(self, state: Any, runtime: Any) -> Any:
        return {"messages": [self.said(), HumanMessage("go on")]}


class AfterTheModel(Speaks):
    def after_model(self, state: Any, runtime: Any) -> Any:
        last = state["messages"][-1]
        return {"messages": [last.model_copy(update={"content": BAD})]}


class AfterTheAgent(Speaks):
    def after_agent(self, state: Any, runtime: Any) -> Any:
        return {"messages": [self.said()]}


class InsteadOfTheTool(Speaks):
    def wrap_tool_call(self, request: Any, handler: Any) -> Any:
        return ToolMessage("flagme", tool_call_id=request.tool_call["id"], name="look_up", id="own")

    async def awrap_tool_call(self, request: Any, handler: Any) -> Any:
        return self.wrap_tool_call(request, handler)


SPEAKERS = [
    InsteadOfTheModel,
    BesideTheModel,
    BeforeTheModel,
    BeforeTheAgent,
    BeforeTheAgentOnly,
    AfterTheModel,
    InsteadOfTheTool,
]


def stack(first: bool, *others: Any, **settings: Any) -> list[Any]:
    return [guard(**settings), *others] if first else [*others, guard(**settings)]


@pytest.mark.parametrize("first", [True, False], ids=["outermost", "innermost"])
@pytest.mark.parametrize("speaker", SPEAKERS)
@pytest.mark.parametrize("model", ["scripted", "guarding itself"])
async def test_what_another_middleware_says_is_not_left_in_the_state(
    watched: Any, speaker: Any, first: bool, model: str
) -> None:
    own = local_model("fine") if model == "guarding itself" and speaker is not InsteadOfTheTool else None
    run = watched(
        [call(word="x"), "fine"] if speaker is InsteadOfTheTool else ["fine"],
        model=own,
        tools=[look_up],
        middleware=stack(first, speaker()),
    )
    for result in (
        await run.agent.ainvoke(HELLO, run.config),
        await asyncio.to_thread(run.agent.invoke, HELLO, run.config),
    ):
        texts = [message.text for message in result["messages"]]
        assert not any("flagme" in text for text in texts)
        assert DEFAULT_NOTICE in texts or TOOL_NOTICE in texts
    assert not any("flagme" in message.text for message in run.messages)
    assert not any("flagme" in repr(asked) for asked in run.model.asked)


@pytest.mark.parametrize("speaker", [InsteadOfTheModel, BeforeTheModel, BeforeTheAgent])
async def test_it_is_replaced_under_its_id(watched: Any, speaker: Any) -> None:
    run = watched(["fine"], middleware=[speaker(), guard()])
    await run.agent.ainvoke(HELLO, run.config)
    answer = run.messages[-1]
    assert (answer.id, answer.text, len(run.messages)) == ("own", DEFAULT_NOTICE, 2)
    assert answer.response_metadata["finish_reason"] == "content_filter"
    assert answer.response_metadata["tta"]["stop_reason"] == "flagged: text"


@pytest.mark.parametrize("speaker", [InsteadOfTheModel, AfterTheModel, InsteadOfTheTool, AfterTheAgent])
async def test_first_in_the_list_nothing_of_it_is_seen_but_by_its_own_node(
    watched: Any, surface: Any, speaker: Any
) -> None:
    """Hooks that stand behind the guard's write into a checkpoint; those around a call do not."""
    run = watched(
        [call(word="x"), "fine"] if speaker is InsteadOfTheTool else ["fine"],
        tools=[look_up],
        middleware=[guard(), speaker()],
    )
    await surface(run, HELLO)
    if speaker in (InsteadOfTheModel, InsteadOfTheTool):
        assert not run.leaks()
    assert not any("flagme" in message.text for message in run.messages)


async def test_what_comes_after_the_last_hook_is_replaced_by_the_next_run(watched: Any) -> None:
    """As docs/agents.md says; and an earlier checkpoint keeps what it held."""
    run = watched(["fine"], middleware=[AfterTheAgent(), guard()])
    await run.agent.ainvoke(HELLO, run.config)
    assert run.messages[-1].text == BAD
    run.agent = watched(["fine"], middleware=[guard()], model=run.model).agent
    run.agent.checkpointer = run.saver
    done = await run.agent.ainvoke(HELLO, run.config)
    assert [message.text for message in done["messages"]][2] == DEFAULT_NOTICE
    assert run.leaks()


async def test_a_rewritten_message_is_stood_in_for_like_any_other(watched: Any) -> None:
    run = watched(["fine"], middleware=[AfterTheModel(), guard(repair_model=local_model())])
    await both_ways(run)
    assert {message.text for message in run.messages[1::2]} == {"A kind word."}
    run = watched(["fine"], middleware=[AfterTheModel(), guard(on_flagged="raise")])
    with pytest.raises(UnsafeAnswerError, match="flagged: text"):
        await run.agent.ainvoke(HELLO, run.config)


async def test_no_tool_runs_from_a_call_that_was_rewritten(watched: Any) -> None:
    ran: list[str] = []

    @tool
    def look_up(word: str) -> str:
        """Look a word up."""
        ran.append(word)
        return "found"

    class Rewrites(AgentMiddleware[Any, Any, Any]):
        def after_model(self, state: Any, runtime: Any) -> Any:
            last = state["messages"][-1]
            if not last.tool_calls:
                return None
            return {"messages": [last.model_copy(update={"tool_calls": call(word="flagme").tool_calls})]}

    run = watched([call(word="good")], tools=[look_up], middleware=[Rewrites(), guard()])
    await both_ways(run)
    assert ran == []
    assert "flagme" not in repr(run.messages)
    assert [message.text for message in run.messages[1::2]] == [DEFAULT_NOTICE] * 2


async def test_nothing_is_judged_twice(watched: Any) -> None:
    moderator = ScriptedModerator()
    middleware = [TTAMiddleware(moderator), BesideTheModel(AIMessage("a remark"))]
    run = watched([call(word="good"), "All done.", "Again."], tools=[look_up], middleware=middleware)
    await both_ways(run)
    texts = [text for texts in moderator.calls for text in texts]
    assert len(texts) == len(set(texts))
    assert "a remark" in texts


@pytest.mark.parametrize("ours", [True, False], ids=["with hooks around", "alone"])
async def test_a_model_that_guards_itself_is_taken_at_its_word_but_not_others(watched: Any, ours: bool) -> None:
    moderator = ScriptedModerator()
    run = watched([], model=local_model("Fine words."), middleware=[TTAMiddleware(moderator)])
    await both_ways(run)
    assert moderator.calls == []
    mark = AIMessage(BAD, response_metadata={"tta": {"outcome": "clean"}})
    run = watched([], model=local_model("Fine words."), middleware=[guard(), InsteadOfTheModel(mark)])
    await both_ways(run)
    assert {message.text for message in run.messages[1::2]} == {DEFAULT_NOTICE}


async def test_history_that_was_never_checked_is(watched: Any) -> None:
    given = {"messages": [HumanMessage("hello"), AIMessage(BAD, id="old"), HumanMessage("and now?")]}
    run = watched(["fine"], middleware=[guard()])
    done = await run.agent.ainvoke(given, run.config)
    assert [(message.id, message.text) for message in done["messages"]][1] == ("old", DEFAULT_NOTICE)
    assert "flagme" not in repr(run.model.asked)
    again = watched(["fine"], middleware=[guard(check_history=False)])
    done = await again.agent.ainvoke(given, again.config)
    assert done["messages"][1].text == BAD


async def test_history_outlives_a_moderator_that_is_down(watched: Any) -> None:
    moderator = ScriptedModerator(failures=[ModerationUnavailableError("down")] * 99)
    given = {"messages": [HumanMessage("hello"), AIMessage("harmless"), HumanMessage("and now?")]}
    run = watched(["fine"], middleware=[TTAMiddleware(moderator)])
    done = await run.agent.ainvoke(given, run.config)
    assert [message.text for message in done["messages"]][1:] == ["harmless", "and now?", DEFAULT_NOTICE]


async def test_a_summary_that_another_middleware_wrote_is_checked(watched: Any) -> None:
    summary: Any = SummarizationMiddleware(
        model=ScriptedChatModel(answers=["a flagme summary"]), trigger=("messages", 4), keep=("messages", 1)
    )
    run = watched(["fine"], middleware=[guard(), summary])
    for _ in range(3):
        await run.agent.ainvoke(HELLO, run.config)
    assert any(message.text == DEFAULT_NOTICE for message in run.messages)
    assert "flagme" not in repr(run.messages)


class Weather(BaseModel):
    """The weather."""

    sky: str


@pytest.mark.parametrize("first", [True, False], ids=["outermost", "innermost"])
async def test_a_structured_response_goes_with_its_message(watched: Any, first: bool) -> None:
    class Parses(AgentMiddleware[Any, Any, Any]):
        async def awrap_model_call(self, request: Any, handler: Any) -> Any:
            return ModelResponse(result=[AIMessage(BAD)], structured_response=Weather(sky="flagme"))

    run = watched(["fine"], middleware=stack(first, Parses()), response_format=ToolStrategy(Weather))
    done = await run.agent.ainvoke(HELLO, run.config)
    assert done.get("structured_response") is None
    assert "flagme" not in repr(done)
