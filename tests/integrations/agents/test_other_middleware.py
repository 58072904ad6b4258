"""The guard beside other middleware, and with structured output."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path
from typing import Any

import pytest
from langchain.agents.middleware import (
    AgentMiddleware,
    HumanInTheLoopMiddleware,
    ModelFallbackMiddleware,
    ModelRetryMiddleware,
    PIIMiddleware,
)
from langchain.agents.structured_output import ProviderStrategy, StructuredOutputValidationError, ToolStrategy
from langchain_core.messages import AIMessage, ToolMessage
from langgraph.types import Command
from pydantic import BaseModel
from tta_langchain_agents import TTAMiddleware
from tta_langchain_agents.testing import ScriptedChatModel

from tta_middleware.errors import UnsafeAnswerError
from tta_middleware.policy import DEFAULT_NOTICE
from tta_middleware.testing.scripted_moderator import ScriptedModerator

sys.path.insert(0, str(Path(__file__).parent))
from staged_agent import BAD, HELLO, both_ways, call, guard, local_model, look_up, updates

pytestmark = [
    pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainBetaWarning"),
    pytest.mark.filterwarnings("ignore:astream_log is deprecated"),
]


class Registers(AgentMiddleware[Any, Any, Any]):
    """Brings a tool that the agent does not know."""

    async def awrap_model_call(self, request: Any, handler: Any) -> Any:
        return await handler(request.override(tools=[*request.tools, updates]))

    async def awrap_tool_call(self, request: Any, handler: Any) -> Any:
        return await handler(request.override(tool=updates))


class Fails(ScriptedChatModel):
    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("no model here")

    def _stream(self, *args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("no model here")


class Swaps(AgentMiddleware[Any, Any, Any]):
    """Puts another model in the agent's place."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def wrap_model_call(self, request: Any, handler: Any) -> Any:
        return handler(request.override(model=self.model))

    async def awrap_model_call(self, request: Any, handler: Any) -> Any:
        return await handler(request.override(model=self.model))


class Answers(AgentMiddleware[Any, Any, Any]):
    """Answers by itself."""

    def wrap_model_call(self, request: Any, handler: Any) -> Any:
        handler(request)
        return AIMessage(BAD, id="own")

    async def awrap_model_call(self, request: Any, handler: Any) -> Any:
        await handler(request)
        return AIMessage(BAD, id="own")


class TestOtherMiddleware:
    @pytest.mark.parametrize("first", [True, False], ids=["outermost", "innermost"])
    async def test_a_model_that_another_one_swaps_in_is_guarded(self, watched: Any, surface: Any, first: bool) -> None:
        others: list[Any] = [Swaps(ScriptedChatModel(answers=[BAD]))]
        run = watched(["never asked"], middleware=[guard(), *others] if first else [*others, guard()])
        await surface(run, HELLO)
        assert run.messages[-1].text == DEFAULT_NOTICE
        assert not run.leaks()

    @pytest.mark.parametrize("first", [True, False], ids=["outermost", "innermost"])
    async def test_fallbacks_and_retries_are_guarded(self, watched: Any, first: bool) -> None:
        others: list[Any] = [
            ModelFallbackMiddleware(ScriptedChatModel(answers=[BAD])),
            ModelRetryMiddleware(max_retries=1, initial_delay=0, on_failure="error"),
        ]
        run = watched([], model=Fails(answers=[]), middleware=[guard(), *others] if first else [*others, guard()])
        await both_ways(run)
        async for item in run.agent.astream(HELLO, run.config, stream_mode="messages"):
            run.seen.append(item)
        assert {answer.text for answer in run.messages[1::2]} == {DEFAULT_NOTICE}
        assert not run.leaks()

    @pytest.mark.parametrize("first", [True, False], ids=["outermost", "innermost"])
    async def test_a_tool_that_another_one_brings_is_checked(self, watched: Any, first: bool) -> None:
        others: list[Any] = [Registers()]
        run = watched(
            [call("updates", word="x"), "done"],
            tools=[look_up],
            middleware=[guard(), *others] if first else [*others, guard()],
        )
        await run.agent.ainvoke(HELLO, run.config)
        assert "withheld" in run.messages[2].text

    async def test_an_answer_that_did_not_come_from_the_model_is_checked(self, watched: Any) -> None:
        run = watched(["fine"], middleware=[guard(), Answers()])
        await both_ways(run)
        assert {(answer.text, answer.id) for answer in run.messages[1::2]} == {(DEFAULT_NOTICE, "own")}

    async def test_a_clean_answer_is_checked_once_in_a_stack(self, watched: Any) -> None:
        moderator = ScriptedModerator()
        others: list[Any] = [PIIMiddleware("email"), ModelRetryMiddleware()]
        run = watched(["fine"], middleware=[others[0], TTAMiddleware(moderator), others[1]])
        await run.agent.ainvoke(HELLO, run.config)
        assert moderator.calls == [["fine"]]

    @pytest.mark.parametrize("first", [True, False], ids=["outermost", "innermost"])
    @pytest.mark.parametrize("mode", ["batched", "per_call"])
    @pytest.mark.parametrize("decision", ["approve", "reject", "edit"])
    async def test_human_in_the_loop(self, watched: Any, first: bool, mode: Any, decision: str) -> None:
        human: Any = HumanInTheLoopMiddleware(interrupt_on={"look_up": True}, interrupt_mode=mode)
        run = watched(
            [call(word="good"), "All done."],
            tools=[look_up],
            middleware=[guard(), human] if first else [human, guard()],
        )
        paused = await run.agent.ainvoke(HELLO, run.config)
        assert paused["__interrupt__"]
        edit = {"type": "edit", "edited_action": {"name": "look_up", "args": {"word": "better"}}}
        verdict = edit if decision == "edit" else {"type": decision}
        resumed = {"decisions": [verdict]} if mode == "batched" else verdict
        await asyncio.to_thread(run.agent.invoke, Command(resume=resumed), run.config)
        result = next(message for message in run.messages if isinstance(message, ToolMessage))
        expected = {"approve": "good means well", "edit": "better means well", "reject": "rejected"}
        assert expected[decision] in result.text
        assert run.messages[-1].text == "All done."

    @pytest.mark.parametrize("first", [True, False], ids=["outermost", "innermost"])
    async def test_nobody_is_asked_about_a_flagged_tool_call(self, watched: Any, first: bool) -> None:
        human: Any = HumanInTheLoopMiddleware(interrupt_on={"look_up": True})
        run = watched(
            [call(word="flagme")], tools=[look_up], middleware=[guard(), human] if first else [human, guard()]
        )
        done = await run.agent.ainvoke(HELLO, run.config)
        assert "__interrupt__" not in done
        assert not run.leaks()


class Weather(BaseModel):
    """The weather."""

    sky: str


class AfterModel(AgentMiddleware[Any, Any, Any]):
    """Has a node after the model."""

    def after_model(self, state: Any, runtime: Any) -> None:
        return None


FORMATS = [ToolStrategy(Weather), ProviderStrategy(Weather)]


def weather(strategy: Any, sky: str) -> AIMessage:
    return call("Weather", sky=sky) if isinstance(strategy, ToolStrategy) else AIMessage(f'{{"sky": "{sky}"}}')


@pytest.mark.parametrize("strategy", FORMATS, ids=["tool", "provider"])
@pytest.mark.parametrize("tools", [[], [look_up]], ids=["alone", "with tools"])
class TestStructuredOutput:
    async def test_a_clean_response_is_parsed(self, watched: Any, strategy: Any, tools: Any) -> None:
        run = watched([weather(strategy, "blue")], tools=tools, middleware=[guard()], response_format=strategy)
        done = await run.agent.ainvoke(HELLO, run.config)
        assert done["structured_response"] == Weather(sky="blue")

    async def test_a_flagged_response_ends_the_run_without_one(self, watched: Any, strategy: Any, tools: Any) -> None:
        run = watched([weather(strategy, "flagme")], tools=tools, middleware=[guard()], response_format=strategy)
        await both_ways(run)
        assert [message.text for message in run.messages[1::2]] == [DEFAULT_NOTICE] * 2
        assert run.agent.get_state(run.config).values.get("structured_response") is None
        assert not run.leaks()

    async def test_a_repaired_response_ends_the_run_as_well(self, watched: Any, strategy: Any, tools: Any) -> None:
        middleware = [guard(repair_model=local_model())]
        run = watched([weather(strategy, "flagme")], tools=tools, middleware=middleware, response_format=strategy)
        await both_ways(run)
        assert run.messages[-1].text == "A kind word."

    async def test_it_never_loops(self, watched: Any, strategy: Any, tools: Any) -> None:
        middleware = [AfterModel(), guard()]
        run = watched([weather(strategy, "flagme")], tools=tools, middleware=middleware, response_format=strategy)
        with contextlib.suppress(UnsafeAnswerError):
            await run.agent.ainvoke(HELLO, run.config)
        assert len(run.model.asked) == 1
        assert not run.leaks()


async def test_a_response_that_does_not_parse_is_still_an_error(watched: Any) -> None:
    run = watched(["no weather"], middleware=[guard()], response_format=ProviderStrategy(Weather))
    with pytest.raises(StructuredOutputValidationError):
        await run.agent.ainvoke(HELLO, run.config)
