"""The splitter of thoughts: exact under any chunking, whatever marks a model uses."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest
from chunks import in_sizes
from hypothesis import given, settings
from hypothesis import strategies as st

from tta_middleware.engines.prompt.thoughts import (
    GEMMA,
    HARMONY,
    KNOWN,
    ThoughtMarks,
    ThoughtSplitter,
    between,
    find_marks,
)
from tta_middleware.types import AnswerState

THINK = between("<think>", "</think>")
MAGISTRAL = between("[THINK]", "[/THINK]")
PLAIN = st.text(alphabet="ab <>/[]think\n。", max_size=30)
SIZES = st.lists(st.integers(0, 5), max_size=40)


def joined(pieces: Iterable[tuple[str, str]]) -> tuple[str, str]:
    """Thoughts and answer."""
    found = list(pieces)
    return "".join(t for c, t in found if c == "reasoning"), "".join(t for c, t in found if c == "answer")


def split(marks: ThoughtMarks | None, chunks: Iterable[str], state: AnswerState = "before") -> tuple[str, str]:
    """By text alone."""
    splitter = ThoughtSplitter(marks, state)
    return joined([*(piece for chunk in chunks for piece in splitter.text(chunk)), *splitter.finish()])


def split_tokens(marks: ThoughtMarks, text: str, sizes: Sequence[int] = ()) -> tuple[str, str]:
    """With every mark as a token, the text between them in chunks."""
    splitter = ThoughtSplitter(replace(marks, tokens=frozenset(marks.meanings)))
    pattern, pieces = "|".join(map(re.escape, sorted(marks.meanings, key=len, reverse=True))), []
    for index, part in enumerate(re.split(f"({pattern})", text)):
        for chunk in [part] if index % 2 else in_sizes(part, sizes):
            pieces += splitter.mark(chunk) if index % 2 else splitter.text(chunk)
    return joined([*pieces, *splitter.finish()])


@settings(max_examples=80)
@given(parts=st.lists(st.one_of(PLAIN, st.sampled_from(["<think>", "</think>", "<thi", "\n\n"])), max_size=8),
       sizes=SIZES, state=st.sampled_from(["before", "open", "inside", "closed", "said"]))  # fmt: skip
def test_chunks_change_nothing(parts: list[str], sizes: list[int], state: AnswerState) -> None:
    text = "".join(parts)
    assert split(THINK, in_sizes(text, sizes), state) == split(THINK, [text], state)


@settings(max_examples=50)
@given(parts=st.lists(st.one_of(PLAIN, st.sampled_from(sorted(
    {*HARMONY.meanings, *GEMMA.meanings, "analysis", "final", "commentary", "thought\n"}))), max_size=10),
       sizes=SIZES, marks=st.sampled_from([HARMONY, GEMMA]))  # fmt: skip
def test_chunks_change_nothing_where_marks_are_tokens(parts: list[str], sizes: list[int], marks: ThoughtMarks) -> None:
    text = "".join(parts)
    assert split_tokens(marks, text, sizes) == split_tokens(marks, text)


@settings(max_examples=50)
@given(thought=PLAIN, answer=PLAIN, sizes=SIZES, marks=st.sampled_from([THINK, MAGISTRAL]), opened=st.booleans())
def test_what_is_written_is_what_is_found(
    thought: str, answer: str, sizes: list[int], marks: ThoughtMarks, opened: bool
) -> None:
    """A thought and an answer, the prompt's template opening the thought or the model."""
    if any(mark in thought or mark in answer for mark in marks.meanings) or not answer.strip():
        return
    text = f"{'' if opened else marks.opening}{thought}{marks.closing}{answer}"
    found = split(marks, in_sizes(text, sizes), "open" if opened else "before")
    assert found == (thought.strip(), answer.lstrip())


@settings(max_examples=30)
@given(text=st.text(max_size=60), sizes=SIZES)
def test_a_model_that_does_not_think_is_passed_on_as_it_is(text: str, sizes: list[int]) -> None:
    assert split(None, in_sizes(text, sizes)) == ("", text)
    if not any(mark in text for mark in THINK.meanings):
        assert split(THINK, in_sizes(text, sizes)) == ("", text)


@pytest.mark.parametrize(
    ("text", "state", "thought", "answer"),
    [
        ("<think>\nbees\n</think>\n\nKeep them.", "before", "bees", "Keep them."),
        ("bees\n</think>\n\nKeep them.", "open", "bees", "Keep them."),
        (" and wax</think>So.", "inside", " and wax", "So."),
        ("<think>\n\n</think>\n\nKeep them.", "before", "", "Keep them."),
        ("\n\nKeep them.", "closed", "", "Keep them."),
        (" them.", "said", "", " them."),
        ("Keep them.", "before", "", "Keep them."),
        ("</think>Keep them.", "before", "", "Keep them."),
        ("<think>bees, and so on", "before", "bees, and so on", ""),
        ("Write <think> before it.", "before", "", "Write <think> before it."),
        ("It ends with </think>.", "before", "", "It ends with </think>."),
        ("<think>one</think> <think>two</think> Three.", "before", "one\n\ntwo", "Three."),
        ("<think>a <think> b</think>c", "before", "a <think> b", "c"),
    ],
)
def test_marks_in_text(text: str, state: AnswerState, thought: str, answer: str) -> None:
    assert split(THINK, [text], state) == (thought, answer)
    assert split(THINK, list(text), state) == (thought, answer)


def test_a_mark_that_is_a_token_cannot_be_spelled() -> None:
    splitter = ThoughtSplitter(replace(THINK, tokens=frozenset(THINK.meanings)))
    pieces = [*splitter.text("</think>"), *splitter.mark("<think>"), *splitter.text("the user wrote </think> here")]
    pieces += [*splitter.mark("</think>"), *splitter.text("<think>No.</think>"), *splitter.finish()]
    assert joined(pieces) == ("the user wrote </think> here", "</think>\n\n<think>No.</think>")


@pytest.mark.parametrize(
    ("said", "state", "thought", "answer"),
    [
        (
            "<think>a</think>A <think> begins it, </think> ends it.",
            "before",
            "a",
            "A <think> begins it, </think> ends it.",
        ),
        ("Write <think> first.", "closed", "", "Write <think> first."),
        (" and <think> then.", "said", "", " and <think> then."),
        ("<think>a</think><think>b</think>So.", "before", "a\n\nb", "So."),
        ("Well, <think>a</think>So.", "before", "a", "Well, So."),
    ],
)
def test_a_mark_behind_words_of_the_answer_is_one_of_them(
    said: str, state: AnswerState, thought: str, answer: str
) -> None:
    """A model that is asked about its marks writes them by their tokens; the rest of its answer is no thought."""
    splitter = ThoughtSplitter(replace(THINK, tokens=frozenset(THINK.meanings)), state)
    pieces = []
    for index, part in enumerate(re.split("(</?think>)", said)):
        pieces += splitter.mark(part) if index % 2 else splitter.text(part)
    assert joined([*pieces, *splitter.finish()]) == (thought, answer)


def test_harmony() -> None:
    text = (
        "<|channel|>analysis<|message|>Bees need hives.<|end|><|start|>assistant<|channel|>commentary<|message|>"
        "I look it up.<|end|><|start|>assistant<|channel|>analysis<|message|>Found.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Keep them warm."
    )
    assert split_tokens(HARMONY, text) == ("Bees need hives.\n\nFound.", "I look it up.\n\nKeep them warm.")
    assert split_tokens(HARMONY, f"{HARMONY.skipping}No.") == ("", "No.")
    assert split_tokens(HARMONY, f"{HARMONY.opening}a{HARMONY.closing}b") == ("a", "b")


def test_gemma() -> None:
    assert split_tokens(GEMMA, "<|channel>thought\nBees.<channel|>Keep them.") == ("Bees.", "Keep them.")
    assert split_tokens(GEMMA, f"{GEMMA.skipping}Keep them.") == ("", "Keep them.")


@pytest.mark.parametrize("marks", KNOWN, ids=lambda marks: marks.opening.strip())
def test_what_a_template_writes_says_where_the_answer_stands(marks: ThoughtMarks) -> None:
    begin = "<|start|>assistant" if marks is HARMONY else "<|im_start|>assistant\n"
    assert marks.ending(begin) == "before"
    assert marks.ending(f"{begin}{marks.opening}") == "open"
    assert marks.ending(f"{begin}{marks.opening}Well,") == "inside"
    # A channel of the answer's own may follow a thought that is none.
    assert marks.ending(f"{begin}{marks.skipping}") == ("before" if marks is HARMONY else "closed")
    assert marks.ending(f"{begin}{marks.opening}a{marks.closing}") == "closed"


def test_marks_are_found_by_tokens_template_and_declaration() -> None:
    assert find_marks([], "{{ messages }}") is None
    found = find_marks(["<think>", "</think>"], "{{ messages }}")
    assert found is not None
    assert found.tokens == {"<think>", "</think>"}
    spelled = find_marks([], "{{ messages }}<think>\n")
    assert spelled is not None
    assert spelled.tokens == set()
    assert find_marks(HARMONY.meanings, "") == replace(HARMONY, tokens=frozenset(HARMONY.meanings))
    declared = {"fields": {"thinking": {"open": "<reflect>", "close": "</reflect>"}, "content": {}}}
    own = find_marks(["<reflect>"], "", declared)
    assert own is not None
    assert (own.opening, own.tokens) == ("<reflect>\n", {"<reflect>"})
