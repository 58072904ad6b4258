"""Every way to run an agent: what is flagged is nowhere, what is safe is as it was."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from tta_langchain_agents import TTAMiddleware

from tta_middleware.policy import DEFAULT_NOTICE
from tta_middleware.testing.delays import UNEQUAL, Unequal
from tta_middleware.testing.scripted_moderator import ScriptedModerator

sys.path.insert(0, str(Path(__file__).parent))
from staged_agent import call, look_up_or_worse

pytestmark = [
    pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainBetaWarning"),
    pytest.mark.filterwarnings("ignore:astream_log is deprecated"),
]

LONG = "A safe sentence about trees and rivers. " * 6


def guard(**settings: Any) -> TTAMiddleware:
    return TTAMiddleware(ScriptedModerator(), **settings)


FLAGGED: dict[str, Any] = {
    "early": "flagme at once",
    "late": LONG + "and flagme at the end",
    "reasoning": AIMessage([{"type": "reasoning", "reasoning": "I could flagme.", "index": 0}, LONG]),
    "reasoning-kwarg": AIMessage(LONG, additional_kwargs={"reasoning_content": "I could flagme."}),
    "additional-kwargs": AIMessage(LONG, additional_kwargs={"refusal": "flagme"}),
    "unknown-block": AIMessage([LONG, {"type": "note", "body": ["flagme"]}]),
    "tool-call": call(word="flagme"),
    "tool-argument-name": call(flagme="word"),
    "logprobs": AIMessage("flagme", response_metadata={"logprobs": [{"token": "flagme"}]}),
}


async def test_the_detector_finds_a_leak_in_each_place(watched: Any, surface: Any) -> None:
    run = watched(["This is flagme."])
    await surface(run, {"messages": [HumanMessage("hello")]})
    assert run.leaks()
    assert any("flagme" in text for text in run.listener.heard)
    assert any("flagme" in text for text in run.tracer.runs)
    assert b"flagme" in pickle.dumps((dict(run.saver.blobs), dict(run.saver.writes)))


async def test_a_clean_answer_arrives_whole(watched: Any, surface: Any) -> None:
    run = watched([LONG], middleware=[guard()])
    await surface(run, {"messages": [HumanMessage("hello")]})
    answer = run.messages[-1]
    assert answer.text == LONG
    assert answer.response_metadata["tta"]["outcome"] == "clean"
    assert answer.response_metadata["tta"]["baseline"]["flagged"] is False
    assert not run.leaks()


REFUSAL = {"type": "refusal", "refusal": DEFAULT_NOTICE}


# All of them go over every surface below, too.
QUICK_KINDS = {"late", "reasoning", "tool-call"}
FLAGGED_CASES = [
    pytest.param(flagged, id=kind, marks=[] if kind in QUICK_KINDS else [pytest.mark.slow])
    for kind, flagged in FLAGGED.items()
]


@pytest.mark.parametrize("flagged", FLAGGED_CASES)
async def test_a_flagged_message_is_nowhere(watched: Any, surface: Any, flagged: Any) -> None:
    run = watched([flagged], tools=[look_up_or_worse], middleware=[guard()])
    await surface(run, {"messages": [HumanMessage("hello")]})
    assert not run.leaks()
    answer = run.messages[-1]
    assert isinstance(answer, AIMessage)
    assert answer.text.endswith(DEFAULT_NOTICE)
    assert not answer.tool_calls
    assert answer.response_metadata["finish_reason"] == "content_filter"
    assert answer.response_metadata["normalized_finish_reason"] == "content_filter"
    assert answer.response_metadata["refusal"] == DEFAULT_NOTICE
    if isinstance(answer.content, str):  # LangChain derives no blocks for content that is blocks already
        assert answer.content_blocks[-1] == REFUSAL
    assert answer.response_metadata["tta"]["outcome"] == "blocked"
    assert [message.type for message in run.messages] == ["human", "ai"]


async def test_a_flagged_tool_result_is_replaced_under_its_ids(watched: Any, surface: Any) -> None:
    run = watched([call(word="bad"), "All done."], tools=[look_up_or_worse], middleware=[guard()])
    await surface(run, {"messages": [HumanMessage("hello")]})
    assert not run.leaks()
    result = run.messages[2]
    assert isinstance(result, ToolMessage)
    assert result.tool_call_id == "call-1"
    assert result.name == "look_up"
    assert "withheld" in result.text
    assert result.response_metadata["tta"]["stop_reason"] == "flagged: tool_result"
    assert run.messages[-1].text == "All done."


async def test_a_clean_tool_turn_is_left_as_it_is(watched: Any, surface: Any) -> None:
    run = watched([call(word="good"), "All done."], tools=[look_up_or_worse], middleware=[guard()])
    await surface(run, {"messages": [HumanMessage("hello")]})
    asked, result = run.messages[1:3]
    assert asked.tool_calls == [{"name": "look_up", "args": {"word": "good"}, "id": "call-1", "type": "tool_call"}]
    assert (result.text, result.status) == ("good means well", "success")
    assert b"good means well" in run.let_out()


async def test_a_flagged_prompt_is_answered_without_the_model(watched: Any, surface: Any) -> None:
    run = watched(["never asked"], middleware=[guard(check_prompt=True)])
    await surface(run, {"messages": [HumanMessage("please flagme", id="question")]})
    assert run.model.asked == []
    question, answer = run.messages
    assert (question.id, question.text, answer.text) == ("question", DEFAULT_NOTICE, DEFAULT_NOTICE)
    assert answer.content_blocks[-1] == REFUSAL
    assert answer.response_metadata["tta"]["stop_reason"] == "flagged: prompt"


KINDS: dict[str, tuple[list[Any], str]] = {
    **{kind: ([flagged], "hello") for kind, flagged in FLAGGED.items()},
    "tool-result": ([call(word="bad"), "All done."], "hello"),
    "prompt": (["never asked"], "please flagme"),
    "clean": ([LONG], "hello"),
}
"""What the model says and what the user asks."""

DELAYS = {**UNEQUAL, "slow consumer": lambda _call: 0}


QUICK = "checks overtake each other"
DELAYED = [pytest.param(name, marks=[] if name == QUICK else [pytest.mark.slow]) for name in DELAYS]


@pytest.mark.parametrize("name", DELAYED)
async def test_nothing_leaks_where_checks_take_unequally_long(watched: Any, surface: Any, name: str) -> None:
    """One surface, all kinds; the user's message is checked as well."""
    for kind, (answers, asked) in KINDS.items():
        middleware = TTAMiddleware(Unequal(ScriptedModerator(), DELAYS[name]), check_prompt=True)
        run = watched(answers, tools=[look_up_or_worse], middleware=[middleware])
        run.slow = name == "slow consumer"
        await surface(run, {"messages": [HumanMessage(asked, id="question")]})
        # What the user wrote is the graph's input, which LangGraph stores and streams before any middleware runs.
        assert run.model.asked == [] if kind == "prompt" else not run.leaks(), kind
        assert (DEFAULT_NOTICE in run.messages[-1].text) == (kind not in ("clean", "tool-result")), kind
        assert not any("flagme" in message.text for message in run.messages), kind
