"""Tool calls in text, for all forms; how the text is chunked changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
from chunks import at_places
from hypothesis import given, settings
from hypothesis import strategies as st
from written_calls import KINDS, TAGGED, TOOLS, written

from tta_middleware.chat_model.tool_parsing import BrokenCall, ParsedCall, Piece, opening, tool_parser
from tta_middleware.tool_forms import TOOL_FORMS
from tta_middleware.types import ToolFormat

NAMES = st.sampled_from(["get_weather", "add"])
MARKED = [kind for kind in KINDS if kind != "llama"]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=8) | st.sampled_from(["</tool_call>", '"', "\\"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=5,
)
calls = st.builds(ParsedCall, NAMES, st.dictionaries(st.text(max_size=5), json_values, max_size=3))
plain_keys = st.text("abcdefgh_", min_size=1, max_size=4)
gemma_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.text(max_size=8)
    | st.sampled_from(["<tool_call|>", '"', "{,a:"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(plain_keys, inner, max_size=2),
    max_leaves=5,
)
words = st.text(max_size=8) | st.sampled_from(
    ["</tool_call>", "</parameter>", "<parameter=s>", "</function>", "\n", " true", "null", "5", "[1]", '"', "\\u0041"]
)
typed = st.fixed_dictionaries(
    {},
    optional={
        "s": words,
        "n": st.integers(),
        "x": st.floats(allow_nan=False, allow_infinity=False),
        "b": st.booleans(),
        "l": st.lists(json_values, max_size=2),
        "o": st.dictionaries(st.text(max_size=4), json_values, max_size=2),
        "m": st.none() | st.text("abc\n5", max_size=5),
    },
)


def calls_of(kind: ToolFormat) -> st.SearchStrategy[ParsedCall]:
    """Calls that can be written in that form."""
    if kind in TAGGED:
        return st.builds(ParsedCall, NAMES, typed)
    if kind == "gemma4":
        return st.builds(ParsedCall, NAMES, st.dictionaries(plain_keys, gemma_values, max_size=3))
    return calls


prose = st.text("ab \n.{<[é🙂", max_size=12)
call_texts = ['{"name": "add", "arguments": {"a": 1}}', '{"name": "add", "parameters": {"a": "}"}}']
structure = ["<function=add>", "</function>", "<parameter=s>", "</parameter>", "add", "call:add", "```json", "```"]
marks = sorted({mark for form in TOOL_FORMS.values() for mark in form.marks} | set(structure))


def fragments_of(kind: ToolFormat) -> st.SearchStrategy[str]:
    """Texts made of what calls of that form are made of, and of others' marks."""
    own = sorted(TOOL_FORMS[kind].marks)
    pieces = [*call_texts, *marks, *own * 3, *written(kind, [ParsedCall("add", {"s": "x"})]).split("s"), "Hello"]
    return st.lists(st.sampled_from([*pieces, *'[]{}"\\ \n;<🙂']), max_size=12).map("".join)


def parse(kind: ToolFormat | None, chunks: list[str]) -> tuple[str, list[Piece]]:
    """The text and the calls, broken ones included."""
    parser = tool_parser(kind, ["get_weather", "add"], TOOLS)
    pieces = [piece for chunk in chunks for piece in parser.feed(chunk)] + parser.finish()
    return "".join(p for p in pieces if isinstance(p, str)), [p for p in pieces if not isinstance(p, str)]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(data=st.data(), at=st.lists(st.integers(0, 500), max_size=8))
def test_any_chunking_gives_the_same_text_and_calls(kind: ToolFormat, data: Any, at: list[int]) -> None:
    text = data.draw(fragments_of(kind))
    whole = parse(kind, [text])
    assert parse(kind, at_places(text, at)) == whole
    assert parse(kind, list(text)) == whole


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ('<tool_call>{"name": "a</tool_call>', [14, 25]),
        ('a<tool_call>"</tool_call>b<tool_call>{"name": "add"}</tool_call>', [13]),
    ],
)
def test_the_end_of_a_call_inside_a_string_is_none_in_any_chunking(text: str, at: list[int]) -> None:
    assert parse("hermes", at_places(text, at)) == parse("hermes", list(text)) == parse("hermes", [text])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30)
@given(data=st.data(), at=st.lists(st.integers(0, 500)))
def test_what_a_model_writes_is_what_is_called(kind: ToolFormat, data: Any, at: list[int]) -> None:
    wanted = data.draw(st.lists(calls_of(kind), min_size=1, max_size=3))
    assert parse(kind, at_places(written(kind, wanted), at)) == ("", wanted)


@pytest.mark.parametrize("kind", MARKED)
@settings(max_examples=20)
@given(data=st.data(), before=prose, at=st.lists(st.integers(0, 500)))
def test_words_before_a_call_stay_and_the_space_between_goes(
    kind: ToolFormat, data: Any, before: str, at: list[int]
) -> None:
    wanted = data.draw(st.lists(calls_of(kind), min_size=1, max_size=2))
    assert parse(kind, at_places(before + "\n" + written(kind, wanted), at)) == (before.rstrip(), wanted)


@given(kind=st.sampled_from([None, *KINDS]), text=prose, at=st.lists(st.integers(0, 50)))
def test_text_without_calls_passes_unchanged(kind: ToolFormat | None, text: str, at: list[int]) -> None:
    assert parse(kind, at_places(text, at)) == (text, [])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("forced", [False, True])
def test_an_opening_is_the_beginning_of_what_a_model_writes(kind: ToolFormat, forced: bool) -> None:
    begun = opening(kind, "add" if forced else None)
    assert written(kind, [ParsedCall("add", {"s": "x"})]).startswith(begun)


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


@pytest.mark.parametrize("kind", MARKED)
def test_a_call_that_is_cut_off_is_told_apart_and_nothing_of_it_is_lost(kind: ToolFormat) -> None:
    whole = written(kind, [ParsedCall("add", {"s": "some words", "o": {"a": "more"}})])
    text = whole[: whole.index("more")]
    said, found = parse(kind, [text])
    assert said == ""
    assert [type(piece) for piece in found] == [BrokenCall]
    assert found[0] == BrokenCall(text[text.index(TOOL_FORMS[kind].open) :])


@pytest.mark.parametrize("kind", TAGGED)
def test_a_value_is_typed_by_the_schema_and_a_string_stays_as_it_is(kind: ToolFormat) -> None:
    given = {
        "s": "5",
        "n": "5",
        "x": "1e3",
        "b": "True",
        "l": "['a', 1]",
        "o": '{"k": [1]}',
        "m": "null",
        "unknown": "5",
    }
    typed = {"s": "5", "n": 5, "x": 1000.0, "b": True, "l": ["a", 1], "o": {"k": [1]}, "m": None, "unknown": "5"}
    assert parse(kind, [written(kind, [ParsedCall("add", given)])]) == ("", [ParsedCall("add", typed)])
    wrong = {"n": "five", "b": "5", "l": "{}", "x": "[[" * 2000}
    assert parse(kind, [written(kind, [ParsedCall("add", wrong)])]) == ("", [ParsedCall("add", wrong)])


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("qwen3_coder", "<tool_call><function=add></function></tool_call>", ParsedCall("add", {})),
        (
            "qwen3_coder",
            "<tool_call>\n<function=add>\n<parameter=n>\n5\n</parameter>\n</function>",
            ParsedCall("add", {"n": 5}),
        ),
        ("qwen3_coder", '<tool_call>{"name": "add", "arguments": {}}</tool_call>', ParsedCall("add", {})),
        ("glm45", "<tool_call>add</tool_call>", ParsedCall("add", {})),
        (
            "glm45",
            "<tool_call>add<arg_key>n</arg_key><arg_value>5</arg_value></tool_call>",
            ParsedCall("add", {"n": 5}),
        ),
        ("mistral_v11", "[TOOL_CALLS]add[CALL_ID]123456789[ARGS]{}", ParsedCall("add", {})),
        ("kimi_k2", "<|tool_call_begin|>add<|tool_call_argument_begin|>{}<|tool_call_end|>", ParsedCall("add", {})),
        ("gemma4", '<|tool_call>call:add{<|"|>a b<|"|>:None}<tool_call|>', ParsedCall("add", {"a b": None})),
    ],
)
def test_variants_of_a_form_are_understood(kind: ToolFormat, text: str, expected: Any) -> None:
    assert parse(kind, [text]) == ("", [expected])


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("qwen3_coder", "<tool_call>\n<function=add>\n<parameter=s>\nx\n</function>\n</tool_call>"),
        ("qwen3_coder", "<tool_call>\nadd\n</tool_call>"),
        ("glm45", "<tool_call></tool_call>"),
        ("glm45", "<tool_call>add\n<arg_key>s</arg_key>\n</tool_call>"),
        ("minimax_m2", "<minimax:tool_call></minimax:tool_call>"),
        ("kimi_k2", "<|tool_call_begin|>functions.add:0<|tool_call_end|>"),
        ("deepseek_v31", '<｜tool▁call▁begin｜>add<｜tool▁sep｜>["a"]<｜tool▁call▁end｜>'),
        ("gemma4", "<|tool_call>call:add{s:words}<tool_call|>"),
        ("mistral_v11", "[TOOL_CALLS]add[ARGS]{} and words"),
        ("hermes", "<tool_call>" + "[" * 100_000),
    ],
)
def test_what_is_not_of_the_form_is_a_broken_call(kind: ToolFormat, text: str) -> None:
    assert parse(kind, [text]) == ("", [BrokenCall(text)])


def test_words_after_a_broken_call_are_not_lost() -> None:
    text = '<tool_call>{"name": "add}</tool_call> Sorry. <tool_call>{"name": "add"}</tool_call>'
    broken = BrokenCall('<tool_call>{"name": "add}</tool_call>')
    assert parse("hermes", [text]) == (" Sorry.", [broken, ParsedCall("add", {})])
