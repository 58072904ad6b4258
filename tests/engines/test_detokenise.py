"""Streaming text: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tta_middleware.engines.prompt.detokenise import Detokeniser, StopFilter, TextAssembler

# SmolLM2's vocabulary lacks a few control characters and drops them.
unicode_text = st.text(
    st.characters(
        max_codepoint=0x1FFFF, exclude_categories=["Cs", "Cc"], exclude_characters="\N{REPLACEMENT CHARACTER}"
    )
)


def pieces(tokenizer: Any, token_ids: Sequence[int], context: Sequence[int] = ()) -> list[str]:
    detokeniser = Detokeniser(tokenizer.decode, context=context)
    return [*map(detokeniser.push, token_ids), detokeniser.flush()]


@given(text=unicode_text)
@settings(max_examples=150, deadline=None)
def test_pieces_add_up_to_the_text(tokenizer: Any, text: str) -> None:
    found = pieces(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])
    assert "".join(found) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in found)


@given(ids=st.lists(st.integers(17, 49151), max_size=30))
@settings(max_examples=100, deadline=None)
def test_any_ids_read_as_the_whole_does_up_to_unfinished_bytes(tokenizer: Any, ids: list[int]) -> None:
    whole = tokenizer.decode(ids).rstrip("\N{REPLACEMENT CHARACTER}")
    assert "".join(pieces(tokenizer, ids)).rstrip("\N{REPLACEMENT CHARACTER}") == whole


def test_an_emoji_of_several_tokens_comes_whole(tokenizer: Any) -> None:
    ids = tokenizer("a 👩‍🚀 b", add_special_tokens=False)["input_ids"]
    assert len(ids) > 6
    assert {piece for piece in pieces(tokenizer, ids) if "👩" in piece} == {" 👩"}


def test_special_tokens_give_no_text(tokenizer: Any) -> None:
    ids = tokenizer("one<|im_end|> two", add_special_tokens=False)["input_ids"]
    detokeniser = Detokeniser(tokenizer.decode, skip=set(tokenizer.all_special_ids))
    assert "".join(map(detokeniser.push, ids)) == "one two"


def sentencepiece_like(ids: Sequence[int]) -> str:
    """A decoder that drops the first space, as SentencePiece's does."""
    return "".join(f" w{token_id}" for token_id in ids).removeprefix(" ")


def test_a_continuation_keeps_its_leading_space() -> None:
    fresh, continued = Detokeniser(sentencepiece_like), Detokeniser(sentencepiece_like, context=[7, 8])
    assert [fresh.push(1), fresh.push(2)] == ["w1", " w2"]
    assert [continued.push(1), continued.push(2)] == [" w1", " w2"]


@given(
    text=st.text("abc", max_size=40),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 40)),
)
def test_text_is_cut_before_a_stop_string_and_no_part_of_one_leaks(text: str, stop: list[str], cuts: list[int]) -> None:
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    stops, out = StopFilter(stop), ""
    for start, end in itertools.pairwise(bounds):
        out += stops.push(text[start:end])
        seen = text[:end]
        assert not any(s in out for s in stop)
        begun = [s.startswith(seen[at:]) for s in stop for at in range(len(out))]
        assert stops.stopped or not any(begun)
    out += stops.flush()
    assert text.startswith(out)
    assert stops.stopped == any(s in text for s in stop)
    assert stops.stopped or out == text


def answer(pieces: list[tuple[str, str]]) -> str:
    assert all(channel == "answer" for channel, _ in pieces)
    return "".join(text for _, text in pieces)


def test_a_stop_string_across_token_borders_is_cut(tokenizer: Any) -> None:
    ids = tokenizer("The answer is forty-two. Goodbye!", add_special_tokens=False)["input_ids"]
    assembler = TextAssembler(Detokeniser(tokenizer.decode), ["ty-two. Go"])
    out = ""
    for token_id in ids:
        out += answer(assembler.push(token_id))
        if assembler.stopped:
            break
    assert out == "The answer is for"


@pytest.mark.parametrize("ending", ["fort", "forty-tw"])
def test_what_only_looked_like_a_stop_string_comes_out_at_the_end(tokenizer: Any, ending: str) -> None:
    ids = tokenizer(ending, add_special_tokens=False)["input_ids"]
    assembler = TextAssembler(Detokeniser(tokenizer.decode), ["ty-two", "t!"])
    assert "".join(answer(assembler.push(token_id)) for token_id in ids) + answer(assembler.flush()) == ending
