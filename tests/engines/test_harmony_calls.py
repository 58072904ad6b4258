"""GPT-OSS's calls: messages whose headers name a tool, from tokens to calls and back into a prompt."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
from chunks import at_places
from hypothesis import given, settings
from hypothesis import strategies as st
from tool_templates import TEMPLATES

from tta_middleware.chat_model.tool_parsing import BrokenCall, ParsedCall, opening, tool_parser
from tta_middleware.engines.prompt.detokenise import Detokeniser, TextAssembler
from tta_middleware.engines.prompt.template import render_prompt
from tta_middleware.engines.prompt.thoughts import HARMONY, ThoughtSplitter, find_marks
from tta_middleware.types import AnswerState, Message, ToolCall

MARKS = find_marks(HARMONY.meanings, "")
THOUGHT = "<|channel|>analysis<|message|>Bo asked.<|end|><|start|>assistant"
ADD = '<|channel|>commentary to=functions.add json<|message|>{"a": 1}<|call|>'
FIRST = ' to=functions.add<|channel|>commentary json<|message|>{"a": 1}<|call|>'
WORDS = "<|channel|>commentary<|message|>I will add.<|end|><|start|>assistant"
ONE = ParsedCall("add", {"a": 1})
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}


def heard(text: str, at: list[int], state: AnswerState = "before") -> tuple[str, str, list[Any]]:
    """Thoughts, words and calls of what the model writes, its marks as tokens."""
    splitter, pieces = ThoughtSplitter(MARKS, state), []
    for index, part in enumerate(re.split("(" + "|".join(map(re.escape, HARMONY.meanings)) + ")", text)):
        for piece in at_places(part, at) if not index % 2 else ():
            pieces += splitter.text(piece)
        pieces += splitter.mark(part) if index % 2 else []
    pieces += splitter.finish()
    parser = tool_parser("harmony", ["add"])
    found = [one for channel, said in pieces if channel == "answer" for one in parser.feed(said)] + parser.finish()
    words = "".join(one for one in found if isinstance(one, str))
    thoughts = "".join(said for channel, said in pieces if channel == "reasoning")
    return thoughts, words, [one for one in found if not isinstance(one, str)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ADD, ("", "", [ONE])),
        (FIRST, ("", "", [ONE])),
        (ADD.removesuffix("<|call|>"), ("", "", [ONE])),
        (THOUGHT + ADD, ("Bo asked.", "", [ONE])),
        (THOUGHT + FIRST, ("Bo asked.", "", [ONE])),
        (THOUGHT + WORDS + ADD, ("Bo asked.", "I will add.", [ONE])),
        (f"{ADD}<|start|>assistant{FIRST}", ("", "", [ONE, ONE])),
        (f"{ADD.replace('<|call|>', '<|end|>')}<|start|>assistant{FIRST}", ("", "", [ONE, ONE])),
        (f"{ADD}<|start|>assistant<|channel|>final<|message|>Done.", ("", "\n\nDone.", [ONE])),
        (WORDS + "<|channel|>final<|message|>No call.", ("", "I will add.\n\nNo call.", [])),
        (ADD[: ADD.index("1")], ("", "", [BrokenCall('<|channel|>commentary to=functions.add<|message|>{"a": ')])),
        (ADD[: ADD.index(" json")], ("", "", [BrokenCall("<|channel|>commentary to=functions.add")])),
        ("<|channel|>analysis to=functions.add<|message|>{}<|call|>", ("", "", [ParsedCall("add", {})])),
        ("<|channel|>final<|message|>It is to=functions.add, I think.", ("", "It is to=functions.add, I think.", [])),
    ],
)
def test_a_message_to_a_tool_is_a_call(text: str, expected: Any) -> None:
    assert heard(text, []) == expected
    assert heard(text, list(range(len(text)))) == expected


FRAGMENTS = [
    *HARMONY.meanings,
    "analysis",
    "final",
    "commentary",
    " to=functions.add",
    " json",
    '{"a": 1}',
    "words",
    " ",
]


@settings(max_examples=100)
@given(st.lists(st.sampled_from([*FRAGMENTS, ADD, FIRST]), max_size=10).map("".join), st.lists(st.integers(0, 99)))
def test_any_chunking_of_channels_gives_the_same_calls(text: str, at: list[int]) -> None:
    assert heard(text, at) == heard(text, [])


@pytest.fixture(scope="module")
def harmony(tokenizer: Any) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.add_special_tokens({"additional_special_tokens": [*HARMONY.meanings, "<|constrain|>"]})
    changed.chat_template = TEMPLATES["harmony"]
    return changed


@pytest.mark.parametrize(
    ("prefix", "begun"),
    [
        (opening("harmony", "add"), "<|channel|>commentary to=functions.add<|message|>"),
        (opening("harmony"), "<|channel|>commentary to=functions."),
        (f'{opening("harmony", "add")}{{"a": ', '<|channel|>commentary to=functions.add<|message|>{"a": '),
        (
            f'I will.\n\n{opening("harmony", "add")}{{"a": ',
            "<|channel|>final<|message|>I will.<|end|>"
            '<|start|>assistant<|channel|>commentary to=functions.add<|message|>{"a": ',
        ),
        (
            f"{opening('harmony', 'add')}{{}}<|call|>\n\n{opening('harmony', 'add')}",
            "<|channel|>commentary to=functions.add<|message|>{}<|call|><|start|>assistant"
            "<|channel|>commentary to=functions.add<|message|>",
        ),
        (
            f"{opening('harmony', 'add')}{{}}<|call|>\n\nThat is all.\n\n{opening('harmony', 'add')}{{}}",
            "<|channel|>commentary to=functions.add<|message|>{}<|call|><|start|>assistant"
            "<|channel|>final<|message|>That is all.<|end|>"
            "<|start|>assistant<|channel|>commentary to=functions.add<|message|>{}",
        ),
        ("Just <|end|> words", "<|channel|>final<|message|>Just <|end|> words"),
    ],
)
def test_an_answer_goes_on_from_a_call_with_the_marks_of_its_header(harmony: Any, prefix: str, begun: str) -> None:
    rendered = render_prompt(harmony, [Message("user", "Add.")], prefix, [TOOL])
    whole = harmony.decode(rendered.token_ids)
    assert whole.endswith(f"<|start|>assistant{begun}")
    marks = [harmony.decode([one]) for one in rendered.token_ids if one in harmony.added_tokens_decoder]
    spelled = [mark for mark in re.findall(r"<\|\w+\|>", begun) if "Just" not in begun or mark != "<|end|>"]
    assert marks[-len(spelled) :] == spelled


@pytest.mark.parametrize("begun", [opening("harmony"), opening("harmony", "add"), ""])
def test_tokens_of_an_answer_are_a_call(harmony: Any, begun: str) -> None:
    text = '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}<|call|>'
    if begun:
        text = 'add <|constrain|>json<|message|>{"a": 1}<|call|>' if begun.endswith(".") else '{"a": 1}<|call|>'
    prompt = render_prompt(harmony, [Message("user", "Add.")], begun, [TOOL])
    marks = {harmony.convert_tokens_to_ids(mark): mark for mark in HARMONY.meanings}
    decoded = Detokeniser(harmony.decode, skip={harmony.convert_tokens_to_ids("<|constrain|>")})
    assembler = TextAssembler(decoded, (), ThoughtSplitter(MARKS, prompt.ends), marks)
    pieces = [piece for one in harmony(text, add_special_tokens=False)["input_ids"] for piece in assembler.push(one)]
    said = "".join(text for channel, text in [*pieces, *assembler.flush()] if channel == "answer")
    parser = tool_parser("harmony", ["add"])
    assert [*parser.feed(begun + said), *parser.finish()] == [ONE]


def test_several_calls_of_a_turn_are_shown_one_by_one(harmony: Any) -> None:
    talk = [
        Message("user", "Add."),
        Message("assistant", "", (ToolCall("add", {"a": 1}, "x"), ToolCall("add", {"a": 2}, "y")), reasoning="Hm."),
        Message("tool", "three", name="add", tool_call_id="x"),
        Message("tool", "four", name="add", tool_call_id="y"),
    ]
    shown = harmony.decode(render_prompt(harmony, talk, "", [TOOL]).token_ids)
    assert shown.count("Hm.") == 1
    order = [shown.index(part) for part in ('{"a": 1}<|call|>', "three", '{"a": 2}<|call|>', "four")]
    assert order == sorted(order)
