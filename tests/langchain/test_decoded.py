"""Calls and structured answers are judged as they are decoded: escapes hide nothing, however the model is run."""

from __future__ import annotations

import json
from functools import reduce
from operator import add
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.exceptions import ModelRefusalError
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.output_parsers import JsonOutputParser
from langchain_core.tools import tool
from pydantic import BaseModel

from tta_middleware import Noise, Policy, TTAChatModel
from tta_middleware.chat_model.reading import AnswerReader, reading_of
from tta_middleware.chat_model.tools import ToolUse, describe
from tta_middleware.config import Windows
from tta_middleware.guard.guard import Guard
from tta_middleware.testing.scripted_engine import Script, ScriptedCall, ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging
from tta_middleware.types import Message, ToolFormat

ASK = "Please write a mail."
NOTICE = Policy().notice
SMALL = Windows(first=5, largest=5)
NO_CONTEXT = Windows(first=5, largest=5, context=1)
HIDDEN = "\\u0066orbidden"


@tool
def mail(text: str) -> str:
    """Send a mail."""
    return "sent"


def hermes(arguments: str, name: str = "mail") -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def chat(script: Script, **given: Any) -> TTAChatModel:
    engine = ScriptedEngine(script, tools=given.pop("form", "hermes"))
    moderator = ScriptedModerator(score=flagging("forbidden", "😀"))
    return TTAChatModel(**({"model": engine, "moderator": moderator, "method": "none"} | given))


async def both_ways(model: Any) -> list[AIMessage]:
    chunks: list[AIMessageChunk] = [chunk async for chunk in model.astream(ASK)]
    return [await model.ainvoke(ASK), reduce(add, chunks)]


async def collect(runnable: Any, parts: list[Any]) -> None:
    async for part in runnable.astream(ASK):
        parts.append(part)


def said(message: AIMessage) -> str:
    return f"{message.content}{message.tool_calls}{message.invalid_tool_calls}"


CALLS = {
    "a value": hermes(f'{{"text": "{HIDDEN} thing"}}'),
    "every letter": hermes('{"text": "' + "".join(f"\\u{ord(letter):04X}" for letter in "forbidden") + '"}'),
    "a key": hermes(f'{{"{HIDDEN}": "thing"}}'),
    "a name": hermes("{}", HIDDEN),
    "deep inside": hermes(f'{{"text": [{{"a": [["{HIDDEN}"]]}}]}}'),
    "a slash": hermes('{"text": "for\\/bidden and ' + HIDDEN + '"}'),
    "a pair of surrogates": hermes('{"text": "\\ud83d\\ude00"}'),
    "arguments encoded twice": hermes(json.dumps(f'{{"text": "{HIDDEN}"}}')),
    "JSON in a string": hermes(json.dumps({"text": f'{{"inner": "{HIDDEN}"}}'})),
    "JSON behind words in a string": hermes(json.dumps({"text": f'see {{"inner": "{HIDDEN}"}}'})),
    "encoded four times": hermes(json.dumps({"text": json.dumps(json.dumps(json.dumps(HIDDEN)))})),
    "a second call": hermes('{"text": "good"}') + hermes(f'{{"text": "{HIDDEN}"}}'),
    "a broken call": hermes(f'{{"text": "{HIDDEN}"'),
    "words around a call": f"It is a forbid{hermes('{}')}den thing.",
    "JSON before a call": f'```\n{{"a": "{HIDDEN}"}}\n```' + hermes("{}"),
}


@pytest.mark.parametrize("windows", [Windows(), SMALL, Windows(first=16, largest=64)], ids=["usual", "small", "some"])
@pytest.mark.parametrize("release", ["window", "end"])
@pytest.mark.parametrize("text", CALLS.values(), ids=CALLS.keys())
async def test_no_escape_hides_what_a_call_says(text: str, release: str, windows: Windows) -> None:
    model = chat(text, release=release, windows=windows).bind_tools([mail])
    for message in await both_ways(model):
        assert message.response_metadata["finish_reason"] == "content_filter"
        assert "forbidden" not in said(message)
        assert HIDDEN not in said(message)
        assert "😀" not in said(message)


@pytest.mark.parametrize("windows", [Windows(), Windows(first=16, largest=64, context=80)], ids=["usual", "small"])
async def test_words_before_a_long_call_are_judged_with_those_behind_it(windows: Windows) -> None:
    call = hermes(json.dumps({"text": "A good thing. " * 200}))
    text = f"It is a forbid{call}den thing, and a good deal could be said of it. {'And so on. ' * 40}"
    for message in await both_ways(chat(text, windows=windows, max_new_tokens=5_000).bind_tools([mail])):
        assert message.response_metadata["finish_reason"] == "content_filter"
        assert "forbidden" not in said(message)


async def test_what_stands_in_for_a_call_is_parted_from_the_words_before_it() -> None:
    text = f"It is a forbid{hermes(json.dumps({'text': 'forbidden'}))}"
    model = chat(text, windows=SMALL, fallback=lambda _: "den thing.").bind_tools([mail])
    streamed = (await both_ways(model))[1]
    assert (streamed.text, streamed.tool_calls) == ("It is a forbid\n\nden thing.", [])
    assert (await both_ways(chat(hermes('{"text": "forbidden"}')).bind_tools([mail])))[1].text == NOTICE


async def test_a_call_is_judged_whole_however_short_the_windows_are() -> None:
    for message in await both_ways(chat(CALLS["a value"], windows=NO_CONTEXT).bind_tools([mail])):
        assert (message.text, message.tool_calls) == (NOTICE, [])


@pytest.mark.parametrize("choice", ["auto", "any", "mail"])
@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("hermes", hermes(f'{{"text": "{HIDDEN}"}}')),
        ("llama", f'{{"name": "mail", "parameters": {{"text": "{HIDDEN}"}}}}'),
        ("mistral", f'[TOOL_CALLS] [{{"name": "mail", "arguments": {{"text": "{HIDDEN}"}}}}]'),
        ("hermes", f'```json\n{{"name": "mail", "arguments": {{"text": "{HIDDEN}"}}}}\n```'),
    ],
)
async def test_every_form_of_a_call_is_decoded(form: ToolFormat, text: str, choice: str) -> None:
    model = chat(lambda call: text.removeprefix(call.prefix), form=form, windows=SMALL)
    for message in await both_ways(model.bind_tools([mail], tool_choice=choice)):
        assert (message.tool_calls, message.invalid_tool_calls) == ([], [])
        assert message.response_metadata["finish_reason"] == "content_filter"


@pytest.mark.parametrize("text", [hermes('{"text": "a good thing", "n": 2.5, "on": true}'), "No call, but words."])
async def test_what_hides_nothing_is_scored_once(text: str) -> None:
    model = chat(text)
    for message in await both_ways(model.bind_tools([mail])):
        assert message.response_metadata["tta"]["outcome"] == "clean"
    assert {len(texts) for texts in model.moderator.calls} == {1}


async def test_a_call_with_harmless_escapes_passes_and_is_scored_decoded() -> None:
    model = chat(hermes('{"text": "Gr\\u00fc\\u00dfe,\\nBo"}'))
    for message in await both_ways(model.bind_tools([mail])):
        assert [call["args"] for call in message.tool_calls] == [{"text": "Grüße,\nBo"}]
    assert any("Grüße,\nBo" in text for texts in model.moderator.calls for text in texts)


async def test_half_a_pair_of_surrogates_is_replaced() -> None:
    for message in await both_ways(chat(hermes('{"text": "\\ud83d!"}')).bind_tools([mail])):
        assert message.tool_calls[0]["args"] == {"text": "\ufffd!"}


@pytest.mark.parametrize("choice", ["auto", "mail"])
async def test_a_repair_is_judged_decoded(choice: str) -> None:
    def script(call: ScriptedCall) -> str:
        text = "safe" if call.moved > 0.6 and call.seed % 2 else f"{HIDDEN} {call.seed}"
        return hermes(f'{{"text": "{text}"}}').removeprefix(call.prefix)

    model = chat(script, method=Noise(), seed=2)
    for message in await both_ways(model.bind_tools([mail], tool_choice=choice)):
        assert message.response_metadata["tta"]["outcome"] == "neutralised"
        assert [call["args"] for call in message.tool_calls] == [{"text": "safe"}]


async def test_a_late_flag_inside_a_call_is_seen_before_the_call_ends_and_repaired() -> None:
    calm = "Roses like the sun, mint grows in shade, figs want a wall behind them, and plums keep in a cool cellar; "

    def script(call: ScriptedCall) -> str:
        end = "and all is well" if call.moved > 0.6 else f"and a {HIDDEN} thing" + " and more" * 20
        return hermes(f'{{"text": "{calm}{end}"}}').removeprefix(call.prefix)

    model = chat(script, method=Noise(), seed=1, windows=Windows(first=20, largest=40)).bind_tools([mail])
    message = (await both_ways(model))[1]
    assert message.response_metadata["tta"]["seam"] > 100
    assert message.tool_calls[0]["args"]["text"].endswith("and all is well")


class Letter(BaseModel):
    """A letter."""

    text: str


@pytest.mark.parametrize("windows", [Windows(), SMALL])
@pytest.mark.parametrize("fence", [False, True])
@pytest.mark.parametrize("method", ["json_schema", "json_mode", "function_calling"])
async def test_a_structured_answer_is_judged_decoded(method: str, fence: bool, windows: Windows) -> None:
    answer = f'{{"text": "{HIDDEN}"}}'
    answer = f"Here it is:\n```json\n{answer}\n```" if fence else answer

    def script(call: ScriptedCall) -> str:
        return f' {{"text": "{HIDDEN}"}}}}\n</tool_call>' if call.prefix else answer

    structured = chat(script, windows=windows).with_structured_output(Letter, method=method, include_raw=True)
    whole: Any = await structured.ainvoke(ASK)
    assert (whole["raw"].text, whole["parsed"]) == (NOTICE, None)
    assert whole["raw"].response_metadata["finish_reason"] == "content_filter"
    parts: list[Any] = []
    if method == "function_calling":
        # LangChain's own parser of calls ends the stream with the error, whatever was asked for.
        with pytest.raises(ModelRefusalError):
            await collect(structured, parts)
    else:
        await collect(structured, parts)
        assert isinstance(parts[-1]["parsing_error"], ModelRefusalError)
    assert "forbidden" not in f"{whole}{parts}"


async def test_a_parser_behind_the_model_decodes_nothing_that_was_not_judged() -> None:
    model = chat(f'{{"text": "so {HIDDEN}", "more": 1}}', windows=SMALL)
    parts: list[Any] = []
    with pytest.raises(ModelRefusalError):
        await (model | JsonOutputParser()).ainvoke(ASK)
    with pytest.raises(ModelRefusalError):
        await collect(model | JsonOutputParser(), parts)
    assert "forbidden" not in str(parts)


FRAGMENTS = st.sampled_from(
    [
        *('<tool_call>{"name": "mail", "arguments": {"text": "', '"}}</tool_call>', "</tool_call>", "<tool_call>"),
        *("\\u0066", "\\\\u0066", "\\", '"', "{", "word", " ", "\n", "\\n", "\\ud83d\\ude00", "\\ud83d", "1e3"),
    ]
)


@settings(max_examples=300)
@given(st.lists(FRAGMENTS, max_size=14).map("".join), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
async def test_whatever_a_call_says_was_scored_in_these_letters(
    text: str, first: int, largest: int, context: int
) -> None:
    use = ToolUse(tuple(describe([mail])), ("mail",), "hermes")
    moderator = ScriptedModerator(score=flagging("forbidden"))
    windows = Windows(first=first, largest=largest, context=context)
    guard = Guard(ScriptedEngine(text), moderator, windows=windows, reading=reading_of(use))
    released = "".join([getattr(event, "text", "") async for event in guard.stream([Message("user", ASK)])])
    scored = [piece for texts in moderator.calls for piece in texts]
    chunks = AnswerReader(use, str).feed(released)
    for call in (call for chunk in chunks for call in chunk.tool_calls):
        for part in (call["name"], *call["args"], *map(str, call["args"].values())):
            assert any(part in piece for piece in scored)
