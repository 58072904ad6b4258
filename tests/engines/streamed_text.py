"""What streamed text is held against: all ids of an answer decoded at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tta_middleware.engines.prompt.control_tokens import ControlTokens
from tta_middleware.engines.prompt.vocabulary import Vocabulary
from tta_middleware.types import AnswerState, PromptEmbeddings

# Letters that vocabularies cut in the middle, and spaces that decoders are fond of tidying up.
LETTERS = st.text(alphabet="abz dé\n\t ,.!?'s。蜂€🐝👩🏽‍🌾ก", max_size=24)
TIDIED = st.sampled_from([" a", "  two", "it 's , is n't .", " ", "\n\n", "x ", " 👩🏽‍🌾👩🏽‍🌾", "€€", "e\u0301"])
TEXTS = st.lists(st.one_of(LETTERS, TIDIED), max_size=4).map("".join)


def vocabulary_of(tokenizer: Any) -> Vocabulary:
    """A tokenizer with a table of two numbers a token, since only its words matter."""
    import torch

    return Vocabulary(tokenizer, torch.nn.Embedding(len(tokenizer), 2), frozenset(), None)


def ids_of(vocabulary: Vocabulary, text: str) -> list[int]:
    """A text that a model writes: words alone, whatever it spells."""
    tokenizer = vocabulary.tokenizer
    return [token_id for token_id, _ in ControlTokens(tokenizer, "").encode(tokenizer, text, [(0, len(text))])]


def decoded(vocabulary: Vocabulary, ids: Sequence[int]) -> str:
    text: str = vocabulary.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    return text


def streamed(
    vocabulary: Vocabulary,
    ids: Sequence[int],
    *,
    before: Sequence[int] = (),
    ends: AnswerState = "said",
    stop: Sequence[str] = (),
) -> str:
    """What leaves of an answer token by token, behind the tokens of a prompt."""
    count = len(before) + 1
    prompt = PromptEmbeddings(
        np.zeros((count, 2), dtype=np.float32),
        np.array([min(vocabulary._special), *before], dtype=np.int64),
        np.zeros(count, dtype=np.bool_),
        ends=ends,
    )
    assembler, said = vocabulary.assembler(prompt, stop), ""
    for token_id in ids:
        said += "".join(text for _, text in assembler.push(token_id))
        assert "\N{REPLACEMENT CHARACTER}" not in said
        if assembler.stopped:
            return said
    return said + "".join(text for _, text in assembler.flush())


def check_whole(vocabulary: Vocabulary, text: str) -> None:
    """An answer from its beginning reads as its ids do, whatever words the prompt ends with."""
    ids = ids_of(vocabulary, text)
    assert streamed(vocabulary, ids, ends="before") == decoded(vocabulary, ids)
    asked = ids_of(vocabulary, "Bees? Assistant:")
    assert streamed(vocabulary, ids, before=asked, ends="before") == decoded(vocabulary, ids)


def check_continued(vocabulary: Vocabulary, text: str, cut: int) -> None:
    """An answer that goes on behind its first words ends as it would have without a break."""
    ids = ids_of(vocabulary, text)
    cut = min(cut, len(ids))
    begun, whole = decoded(vocabulary, ids[:cut]), decoded(vocabulary, ids)
    if not begun.endswith("\N{REPLACEMENT CHARACTER}"):
        assert begun + streamed(vocabulary, ids[cut:], before=ids[:cut]) == whole


def check_stopped(vocabulary: Vocabulary, text: str, stop: Sequence[str]) -> None:
    """A stop string cuts whatever tokens it lies in; of several, the one that is over first."""
    ids = ids_of(vocabulary, text)
    whole = decoded(vocabulary, ids)
    ends = [(whole.find(one) + len(one), whole.find(one)) for one in stop if one in whole]
    said = streamed(vocabulary, ids, stop=stop)
    assert said == (whole[: min(ends)[1]] if ends else whole)
