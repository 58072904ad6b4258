"""Tool calls in text, for all three formats; how the text is chunked changes nothing."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tta_middleware.chat_model.tool_parsing import BrokenCall, ParsedCall, Piece, opening, tool_parser
from tta_middleware.types import ToolFormat

KINDS: tuple[ToolFormat, ...] = ("hermes", "llama", "mistral")

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=8) | st.sampled_from(["</tool_call>", '"', "\\"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=5,
)
calls = st.builds(
    ParsedCall, st.sampled_from(["get_weather", "add"]), st.dictionaries(st.text(max_size=5), json_values, max_size=3)
)
prose = st.text("ab \n.{<[é🙂", max_size=12)
call_texts = ['{"name": "add", "arguments": {"a": 1}}', '{"name": "add", "parameters": {"a": "}"}}']
marks = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "```json", "```"]
fragments = st.lists(st.sampled_from([*call_texts, *marks, *'[]{}"\\ \n;<🙂', "Hello"]), max_size=12).map("".join)


def parse(kind: ToolFormat | None, chunks: list[str]) -> tuple[str, list[Piece]]:
    """The text and the calls, broken ones included."""
    parser = tool_parser(kind, ["get_weather", "add"])
    pieces = [piece for chunk in chunks for piece in parser.feed(chunk)] + parser.finish()
    return "".join(p for p in pieces if isinstance(p, str)), [p for p in pieces if not isinstance(p, str)]


def cut(text: str, at: list[int]) -> list[str]:
    places = sorted({0, len(text), *(place % (len(text) + 1) for place in at)})
    return [text[start:end] for start, end in itertools.pairwise(places)]


def written(kind: ToolFormat, wanted: list[ParsedCall]) -> str:
    """The calls as a model of that format writes them."""
    key = "parameters" if kind == "llama" else "arguments"
    bodies = [json.dumps({"name": call.name, key: call.arguments}, ensure_ascii=False) for call in wanted]
    if kind == "hermes":
        return "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)
    return "; ".join(bodies) if kind == "llama" else f"[TOOL_CALLS] [{', '.join(bodies)}]"


@given(kind=st.sampled_from(KINDS), text=fragments, at=st.lists(st.integers(0, 500), max_size=8))
@example(kind="hermes", text='<tool_call>{"name": "a</tool_call>', at=[14, 25])
@example(kind="hermes", text='a<tool_call>"</tool_call>b<tool_call>{"name": "add"}</tool_call>', at=[13])
def test_any_chunking_gives_the_same_text_and_calls(kind: ToolFormat, text: str, at: list[int]) -> None:
    whole = parse(kind, [text])
    assert parse(kind, cut(text, at)) == whole
    assert parse(kind, list(text)) == whole


@given(kind=st.sampled_from(KINDS), wanted=st.lists(calls, min_size=1, max_size=3), at=st.lists(st.integers(0, 500)))
def test_what_a_model_writes_is_what_is_called(kind: ToolFormat, wanted: list[ParsedCall], at: list[int]) -> None:
    assert parse(kind, cut(written(kind, wanted), at)) == ("", wanted)


@given(before=prose, wanted=st.lists(calls, min_size=1, max_size=2), at=st.lists(st.integers(0, 500)))
@pytest.mark.parametrize("kind", ["hermes", "mistral"])
def test_words_before_a_call_stay_and_the_space_between_goes(
    kind: ToolFormat, before: str, wanted: list[ParsedCall], at: list[int]
) -> None:
    assert parse(kind, cut(before + "\n" + written(kind, wanted), at)) == (before.rstrip(), wanted)


@given(kind=st.sampled_from([None, *KINDS]), text=prose, at=st.lists(st.integers(0, 50)))
def test_text_without_calls_passes_unchanged(kind: ToolFormat | None, text: str, at: list[int]) -> None:
    assert parse(kind, cut(text, at)) == (text, [])


@given(kind=st.sampled_from(KINDS), call=calls, forced=st.booleans())
def test_an_opening_is_the_beginning_of_what_a_model_writes(kind: ToolFormat, call: ParsedCall, forced: bool) -> None:
    begun, whole = opening(kind, call.name if forced else None), written(kind, [call])
    assert whole.startswith(begun)


def test_prose_is_given_out_at_once_and_a_call_whole() -> None:
    parser = tool_parser("hermes")
    assert parser.feed("Let me look.") == ["Let me look."]
    assert parser.feed(" <tool") == []
    assert not parser.open
    assert parser.feed('_call>{"name": "add", "arguments": ') == []
    assert parser.open
    assert parser.feed('{"a": 1}}</tool_call>') == [ParsedCall("add", {"a": 1})]
    assert not parser.open
    assert parser.feed("Done.") == ["Done."]


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("hermes", '<tool_call>{"name": "add"}</tool_call>', ParsedCall("add", {})),
        ("hermes", '<tool_call>{"name": "add", "arguments": null}</tool_call>', ParsedCall("add", {})),
        ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}', ParsedCall("add", {"a": 1})),
        ("hermes", '<tool_call>{"name": "add", "parameters": {"a": "x\ny"}}', ParsedCall("add", {"a": "x\ny"})),
        ("hermes", '<tool_call>[{"name": "add", "arguments": {}}]</tool_call>', ParsedCall("add", {})),
        ("hermes", ' {"name": "add", "arguments": {"a": 1}}\n', ParsedCall("add", {"a": 1})),
        ("hermes", '```json\n{"name": "add", "arguments": {"a": 1}}\n```', ParsedCall("add", {"a": 1})),
        ("mistral", '{"name": "add", "arguments": {"a": 1}}', ParsedCall("add", {"a": 1})),
        ("llama", '<|python_tag|>{"name": "add", "parameters": {}}', ParsedCall("add", {})),
        ("llama", '```json\n{"name": "unheard_of", "parameters": {}}\n```', ParsedCall("unheard_of", {})),
        ("llama", '\n{"type": "function", "name": "add", "parameters": {}}\n', ParsedCall("add", {})),
        ("mistral", '[TOOL_CALLS] [{"name": "add", "arguments": {}, "id": "123456789"}]', ParsedCall("add", {})),
    ],
)
def test_what_models_get_slightly_wrong_is_understood(kind: ToolFormat, text: str, expected: Any) -> None:
    assert parse(kind, [text]) == ("", [expected])


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("hermes", '<tool_call>{"name": "add", "argum'),
        ("hermes", "<tool_call>"),
        ("hermes", "<tool_call>add(1, 2)</tool_call>"),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "add", "arguments": [1]}</tool_call>'),
        ("hermes", '<tool_call>{"name": "add", "arguments": "a"}</tool_call>'),
        ("mistral", '[TOOL_CALLS] [{"name": "add"'),
        ("llama", "<|python_tag|>brave_search.call()"),
    ],
)
def test_what_cannot_be_called_is_told_apart(kind: ToolFormat, text: str) -> None:
    assert parse(kind, [text]) == ("", [BrokenCall(text)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text", ['{"name": "Bob", "age": 3}', '{"name": "add", "parameters": {"a"', "{}", "```json\n{}\n```"]
)
def test_json_that_is_no_call_is_text(kind: ToolFormat, text: str) -> None:
    assert parse(kind, [text]) == (text, [])


@pytest.mark.parametrize("kind", ["hermes", "mistral"])
def test_a_call_without_a_mark_is_one_of_a_known_tool_only(kind: ToolFormat) -> None:
    text = '{"name": "unheard_of", "arguments": {"a": 1}}'
    assert parse(kind, [text]) == (text, [])


def test_words_after_a_broken_call_are_not_lost() -> None:
    text = '<tool_call>{"name": "add}</tool_call> Sorry. <tool_call>{"name": "add"}</tool_call>'
    broken = BrokenCall('<tool_call>{"name": "add}</tool_call>')
    assert parse("hermes", [text]) == (" Sorry.", [broken, ParsedCall("add", {})])
