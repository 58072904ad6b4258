"""Thoughts and text in streams of real tokens: GPT-OSS's, Magistral's and Gemma's vocabularies, and Qwen's.

python scripts/fetch_tokenizers.py tokenizers/
TTA_TOKENIZERS=tokenizers pytest tests/engines/test_real_tokenizers.py

Qwen's comes from the file that TTA_TOOL_MODEL names (scripts/fetch_second_model.py).
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import streamed_text
from hypothesis import given, settings
from hypothesis import strategies as st
from streamed_text import TEXTS, check_continued, check_stopped, check_whole

from tta_middleware.chat_model.tool_parsing import ParsedCall, tool_parser
from tta_middleware.engines.models import resolve_model
from tta_middleware.engines.prompt.vocabulary import Vocabulary
from tta_middleware.types import PromptEmbeddings

QWEN = "qwen2.5-coder"
FOLDER = Path(os.environ.get("TTA_TOKENIZERS", ""))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("TTA_TOKENIZERS"), reason="TTA_TOKENIZERS names no folder of scripts/fetch_tokenizers.py"
    ),
]

# Words that a vocabulary cuts in the middle of a letter, and marks that somebody spells.
SPELLED = ("<|channel|>analysis<|message|>", "<channel|>", "[/THINK]", "</think>", "final", "thought\n")
LETTERS = st.text(alphabet="abc dë\n。蜂🐝👩🏽‍🌾</|>[]", min_size=1, max_size=24)
SAID = st.one_of(LETTERS, st.sampled_from(SPELLED)).map(str.strip).filter(bool)
TURNS = st.lists(st.tuples(st.sampled_from(["reasoning", "answer"]), SAID), min_size=1, max_size=5)


@cache
def vocabulary(name: str) -> Vocabulary:
    from transformers import AutoTokenizer

    place = resolve_model(os.environ["TTA_TOOL_MODEL"]) if name == QWEN else FOLDER / name
    return streamed_text.vocabulary_of(AutoTokenizer.from_pretrained(str(place), local_files_only=True))


def ids_of(name: str, text: str) -> list[int]:
    return streamed_text.ids_of(vocabulary(name), text)


def mark(name: str, text: str) -> int:
    [token_id] = [one for one, mark in vocabulary(name)._mark_ids.items() if mark == text]
    return token_id


def told_apart(name: str, token_ids: list[int]) -> tuple[str, str]:
    """Thoughts and answer, token by token as a decoder gives them out."""
    empty = PromptEmbeddings(
        np.zeros((1, 2), dtype=np.float32), np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.bool_)
    )
    assembler = vocabulary(name).assembler(empty, ())
    pieces = [*(piece for token_id in token_ids for piece in assembler.push(token_id)), *assembler.flush()]
    return tuple("".join(text for channel, text in pieces if channel == kind) for kind in ("reasoning", "answer"))  # type: ignore[return-value]


def expected(turns: list[tuple[str, str]]) -> tuple[str, str]:
    return tuple("\n\n".join(text for channel, text in turns if channel == kind) for kind in ("reasoning", "answer"))  # type: ignore[return-value]


@settings(max_examples=60, deadline=None)
@given(turns=TURNS)
def test_harmony_as_openais_own_library_writes_and_reads_it(turns: list[tuple[str, str]]) -> None:
    harmony = pytest.importorskip("openai_harmony", reason="openai-harmony is not installed")
    encoding = harmony_encoding()
    token_ids: list[int] = []
    for channel, text in turns:
        message = harmony.Message.from_role_and_content(harmony.Role.ASSISTANT, text)
        token_ids += encoding.render(message.with_channel("analysis" if channel == "reasoning" else "final"))
    # The prompt ends with what begins an answer.
    token_ids = token_ids[2:]
    assert told_apart("gpt-oss", token_ids) == expected(turns)
    parser = harmony.StreamableParser(encoding, harmony.Role.ASSISTANT)
    for token_id in token_ids:
        parser.process(token_id)
    read = [("reasoning" if one.channel == "analysis" else "answer", one.content[0].text) for one in parser.messages]
    assert read == turns


@settings(max_examples=60, deadline=None)
@given(
    thought=SAID, values=st.lists(LETTERS, min_size=1, max_size=3), kind=st.sampled_from(["<|constrain|>json", "json"])
)
def test_a_call_as_openais_own_library_writes_it(thought: str, values: list[str], kind: str) -> None:
    harmony = pytest.importorskip("openai_harmony", reason="openai-harmony is not installed")
    encoding, make = harmony_encoding(), harmony.Message.from_role_and_content
    arguments = {"values": values}
    call = make(harmony.Role.ASSISTANT, json.dumps(arguments, ensure_ascii=False)).with_channel("commentary")
    token_ids = [
        *encoding.render(make(harmony.Role.ASSISTANT, thought).with_channel("analysis")),
        *encoding.render(call.with_recipient("functions.add").with_content_type(kind)),
    ]
    assert token_ids[-1] in vocabulary("gpt-oss").eos_ids
    reasoning, answer = told_apart("gpt-oss", token_ids[2:])
    parser = tool_parser("harmony", ["add"])
    assert (reasoning, [*parser.feed(answer), *parser.finish()]) == (thought, [ParsedCall("add", arguments)])


@cache
def harmony_encoding() -> Any:
    import openai_harmony

    os.environ["TIKTOKEN_ENCODINGS_BASE"] = str(FOLDER)
    return openai_harmony.load_harmony_encoding(openai_harmony.HarmonyEncodingName.HARMONY_GPT_OSS)


@settings(max_examples=60, deadline=None)
@given(turns=TURNS)
def test_harmony_in_the_tokenizer_of_gpt_oss(turns: list[tuple[str, str]]) -> None:
    token_ids: list[int] = []
    for at, (channel, text) in enumerate(turns):
        begin = [mark("gpt-oss", "<|start|>"), *ids_of("gpt-oss", "assistant")] if at else []
        named = ids_of("gpt-oss", "analysis" if channel == "reasoning" else "final")
        token_ids += [*begin, mark("gpt-oss", "<|channel|>"), *named, mark("gpt-oss", "<|message|>")]
        token_ids += [*ids_of("gpt-oss", text), mark("gpt-oss", "<|end|>")]
    assert told_apart("gpt-oss", token_ids) == expected(turns)


@settings(max_examples=60, deadline=None)
@given(thought=SAID, answer=SAID)
@pytest.mark.parametrize(
    ("name", "opening", "named", "closing"),
    [("magistral", "[THINK]", "", "[/THINK]"), ("gemma-4", "<|channel>", "thought\n", "<channel|>")],
)
def test_marks_that_are_tokens_of_a_real_vocabulary(
    name: str, opening: str, named: str, closing: str, thought: str, answer: str
) -> None:
    marks = vocabulary(name).marks
    assert marks is not None
    assert marks.tokens == {opening, closing}
    begin = [mark(name, opening), *(ids_of(name, named) if named else [])]
    token_ids = [*begin, *ids_of(name, thought), mark(name, closing), *ids_of(name, answer)]
    assert told_apart(name, token_ids) == (thought, answer)


NEEDS_QWEN = pytest.mark.skipif(not os.environ.get("TTA_TOOL_MODEL"), reason="TTA_TOOL_MODEL names no model")
NAMES = ["gpt-oss", "magistral", "gemma-4", pytest.param(QWEN, marks=NEEDS_QWEN)]


@settings(max_examples=100, deadline=None)
@given(text=TEXTS, cut=st.integers(0, 40))
@pytest.mark.parametrize("name", NAMES)
def test_streamed_text_is_what_all_ids_decode_to(name: str, text: str, cut: int) -> None:
    check_continued(vocabulary(name), text, cut)
    if vocabulary(name).marks is None:
        check_whole(vocabulary(name), text)


@settings(max_examples=100, deadline=None)
@given(text=TEXTS, ends=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 5)), max_size=3))
@pytest.mark.parametrize("name", NAMES)
def test_stop_strings_cut_wherever_tokens_of_a_real_vocabulary_end(
    name: str, text: str, ends: list[tuple[int, int]]
) -> None:
    check_stopped(vocabulary(name), text, [*filter(None, (text[at : at + size] for at, size in ends)), "zz"])
