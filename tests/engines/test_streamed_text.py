"""Streamed text is what all ids decode to: byte fallback, leading spaces, characters and stop strings over tokens.

Tokenizers of each kind are made here; those of models are in test_real_tokenizers.py.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streamed_text import TEXTS, check_continued, check_stopped, check_whole, ids_of, streamed, vocabulary_of

from tta_middleware.engines.models import resolve_model
from tta_middleware.engines.prompt.vocabulary import Vocabulary

WORDS = ("▁a", "▁b", "it", "▁it", "is", "▁▁", "n't", "▁,", "▁n", "▁n't", "bee", "be", "▁be", "▁bee")
MERGES = (
    ("▁", "a"),
    ("▁", "b"),
    ("i", "t"),
    ("▁", "it"),
    ("i", "s"),
    ("▁", "▁"),
    ("b", "e"),
    ("be", "e"),
    ("▁be", "e"),
)
KINDS = ("llama-2", "gemma", "mistral", "smollm2")


def sentencepiece(kind: str) -> Any:
    """Words with their spaces before them, and bytes for all that is no word."""
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    letters = [chr(code) for code in range(97, 123)] + list("▁,.'!?")
    listed = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *WORDS]
    vocabulary = {word: at for at, word in enumerate(dict.fromkeys(listed))}
    tokenizer = Tokenizer(BPE(vocabulary, list(MERGES), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    spaces, joined = (
        [normalizers.Replace(" ", "▁")],
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()],
    )
    if kind == "llama-2":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *spaces])
        tokenizer.decoder = decoders.Sequence([*joined, decoders.Strip(" ", 1, 0)])
    elif kind == "gemma":
        tokenizer.normalizer = normalizers.Sequence(spaces)
        tokenizer.decoder = decoders.Sequence(joined)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence([*joined, decoders.Strip(" ", 1, 0)])
    return tokenizer


@cache
def vocabulary(kind: str) -> Vocabulary:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if kind == "smollm2":
        return vocabulary_of(AutoTokenizer.from_pretrained(str(resolve_model("smollm2")), local_files_only=True))
    made = PreTrainedTokenizerFast(
        tokenizer_object=sentencepiece(kind), bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=True
    )
    return vocabulary_of(made)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
@settings(max_examples=60, deadline=None)
def test_an_answer_reads_as_all_its_ids_do(kind: str, text: str) -> None:
    check_whole(vocabulary(kind), text)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS, cut=st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_an_answer_that_goes_on_reads_as_if_it_had_not_been_broken_off(kind: str, text: str, cut: int) -> None:
    check_continued(vocabulary(kind), text, cut)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), text=TEXTS)
@settings(max_examples=60, deadline=None)
def test_stop_strings_cut_wherever_tokens_end(kind: str, data: Any, text: str) -> None:
    ends = st.tuples(st.integers(0, len(text)), st.integers(1, 5))
    parts = (
        st.lists(ends.map(lambda place: text[place[0] : sum(place)]).filter(bool), max_size=3) if text else st.just([])
    )
    check_stopped(vocabulary(kind), text, [*data.draw(parts), "zz"])


def test_bytes_before_an_answer_do_not_spoil_its_first_character() -> None:
    """Three bytes a character: the last four tokens of what was said begin inside one."""
    words = vocabulary("llama-2")
    said, more = ids_of(words, "蜂蜂蜂"), ids_of(words, "蜂蜂")[1:]
    assert streamed(words, more, before=said) == "蜂蜂"
