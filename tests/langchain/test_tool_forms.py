"""Every form of tool calls through LangChain: read, streamed, judged and repaired; a scripted model writes them."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.tools import tool
from written_calls import KINDS, TAGGED, written

from tta_middleware import Noise, Policy, TTAChatModel
from tta_middleware.chat_model.reading import AnswerReader, reading_of
from tta_middleware.chat_model.tool_parsing import ParsedCall
from tta_middleware.chat_model.tools import ToolUse, describe
from tta_middleware.config import Windows
from tta_middleware.guard.guard import Guard
from tta_middleware.testing.scripted_engine import Script, ScriptedCall, ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging
from tta_middleware.tool_forms import TOOL_FORMS
from tta_middleware.types import Message, ToolFormat

ASK = "Please write a mail."
NOTICE = Policy().notice
SMALL = Windows(first=5, largest=5)
HIDDEN = "\\u0066orbidden"
MARKED = [kind for kind in KINDS if kind != "llama"]


@tool
def mail(to: str, text: str, copies: int = 0) -> str:
    """Send a mail."""
    return "sent"


def a_mail(text: str, **more: Any) -> ParsedCall:
    return ParsedCall("mail", {"to": "Bo", "text": text, **more})


def chat(kind: ToolFormat, script: Script, **given: Any) -> TTAChatModel:
    engine = ScriptedEngine(script, tools=kind, thinking=given.pop("thinking", False))
    moderator = ScriptedModerator(score=flagging("forbidden"))
    return TTAChatModel(**({"model": engine, "moderator": moderator, "method": "none"} | given))


async def both_ways(model: Any) -> tuple[AIMessage, AIMessageChunk, list[AIMessageChunk]]:
    chunks = [chunk async for chunk in model.astream(ASK)]
    return await model.ainvoke(ASK), reduce(add, chunks), chunks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", ["auto", "any", "mail"])
async def test_calls_are_read_as_the_engine_says(kind: ToolFormat, choice: str) -> None:
    text = written(kind, [a_mail("The garden is open.", copies=2), a_mail("Bye.")])
    model = chat(kind, lambda call: text.removeprefix(call.prefix)).bind_tools([mail], tool_choice=choice)
    asked, streamed, chunks = await both_ways(model)
    for message in (asked, streamed):
        assert [(call["name"], call["args"]) for call in message.tool_calls] == [
            ("mail", {"to": "Bo", "text": "The garden is open.", "copies": 2}),
            ("mail", {"to": "Bo", "text": "Bye."}),
        ]
        assert (message.content, message.invalid_tool_calls) == ("", [])
        assert message.response_metadata["finish_reason"] == "tool_calls"
    # Every chunk with a call holds all of it.
    assert [chunk.tool_calls for chunk in chunks if chunk.tool_call_chunks] == [[call] for call in asked.tool_calls]


@pytest.mark.parametrize("kind", MARKED)
async def test_a_thought_and_words_stand_before_a_call(kind: ToolFormat) -> None:
    call = written(kind, [a_mail("The garden is open.")])
    model = chat(
        kind, f"<think>\nBo asked {TOOL_FORMS[kind].open}\n</think>\n\nI will.\n{call}", thinking=True, reasoning="show"
    )
    for message in (await both_ways(model.bind_tools([mail])))[:2]:
        assert message.text == "I will."
        assert [one["args"]["text"] for one in message.tool_calls] == ["The garden is open."]
        [thought] = [block for block in message.content_blocks if block["type"] == "reasoning"]
        assert "Bo asked" in thought["reasoning"]


@pytest.mark.parametrize("kind", MARKED)
async def test_a_call_that_is_cut_off_is_reported_and_never_carried_out(kind: ToolFormat) -> None:
    whole = written(kind, [a_mail("some words")])
    cut_off = whole[: whole.index("words")]
    for message in (await both_ways(chat(kind, cut_off).bind_tools([mail])))[:2]:
        assert message.tool_calls == []
        [broken] = message.invalid_tool_calls
        assert "".join(str(broken["args"]).split()) in "".join(cut_off.split())
        assert "some" in str(broken["args"])


@pytest.mark.parametrize("kind", KINDS)
async def test_a_tool_that_was_not_bound_is_called_by_its_name_as_in_every_form(kind: ToolFormat) -> None:
    text = written(kind, [ParsedCall("unheard_of", {"a": "b"})])
    message = await chat(kind, text).bind_tools([mail]).ainvoke(ASK)
    assert [(call["name"], call["args"]) for call in message.tool_calls] == [("unheard_of", {"a": "b"})]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("windows", [Windows(), SMALL], ids=["usual", "small"])
@pytest.mark.parametrize("said", ["a forbidden thing", HIDDEN])
async def test_no_argument_leaves_unchecked(kind: ToolFormat, windows: Windows, said: str) -> None:
    # As the model writes it: an escape is one backslash, in tagged values as in JSON.
    text = written(kind, [a_mail("ok"), a_mail(said)]).replace("\\\\", "\\")
    asked, streamed, chunks = await both_ways(chat(kind, text, windows=windows).bind_tools([mail]))
    for message in (asked, streamed):
        assert message.response_metadata["finish_reason"] == "content_filter"
        assert message.invalid_tool_calls == []
    for left in (asked, *chunks):
        assert "forbidden" not in f"{left.content}{left.tool_calls}"
        assert HIDDEN not in f"{left.content}{left.tool_calls}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", ["auto", "any"])
async def test_flagged_arguments_are_repaired(kind: ToolFormat, choice: str) -> None:
    def script(call: ScriptedCall) -> str:
        text = "a safe thing" if call.moved > 0.6 else "a forbidden thing"
        return written(kind, [a_mail(text)]).removeprefix(call.prefix)

    model = chat(kind, script, method=Noise(), seed=1).bind_tools([mail], tool_choice=choice)
    asked, streamed, chunks = await both_ways(model)
    for message in (asked, streamed):
        assert message.response_metadata["tta"]["outcome"] == "neutralised"
        assert [call["args"] for call in message.tool_calls] == [{"to": "Bo", "text": "a safe thing"}]
    assert "forbidden" not in str(chunks)


def pieces_of(kind: ToolFormat) -> list[str]:
    around = written(kind, [ParsedCall("mail", {"text": "CUT"})]).split("CUT")
    return [*around, *around, *TOOL_FORMS[kind].marks, "\\u0066", "\\", '"', "{", "word", " ", "\n", "null", "1e3"]


@pytest.mark.parametrize("kind", [*TAGGED, "gemma4", "kimi_k2", "deepseek_v3", "mistral_v11"])
@settings(max_examples=12)
@given(st.data(), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
async def test_whatever_a_call_says_was_scored_in_these_letters(
    kind: ToolFormat, data: Any, first: int, largest: int, context: int
) -> None:
    text = "".join(data.draw(st.lists(st.sampled_from(pieces_of(kind)), max_size=14)))
    use = ToolUse(tuple(describe([mail])), ("mail",), kind)
    moderator = ScriptedModerator(score=flagging("forbidden"))
    windows = Windows(first=first, largest=largest, context=context)
    guard = Guard(ScriptedEngine(text), moderator, windows=windows, reading=reading_of(use))
    released = "".join([getattr(event, "text", "") async for event in guard.stream([Message("user", ASK)])])
    scored = [piece for texts in moderator.calls for piece in texts]
    for call in (call for chunk in AnswerReader(use, str).feed(released) for call in chunk.tool_calls):
        for part in (call["name"], *call["args"], *map(str, call["args"].values())):
            assert any(part in piece for piece in scored)
