"""Long texts: the whole and its windows, at once or as the text grows.

A harmful passage must not drown in harmless text around it, so a long text's logit is the larger of the whole
text's and, less a margin, that of its most suspicious window. Windows start at fixed words: as a text grows, a
window that has been passed never changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tta_middleware.moderation.embedded.features import char_grams, hash_words, word_grams
from tta_middleware.moderation.embedded.linear import Evidence, LinearHeads, Table
from tta_middleware.moderation.embedded.text import words

if TYPE_CHECKING:
    from numpy.typing import NDArray

WIDTH = 96
STRIDE = 48
MARGIN = 0.75


def windowed_logits(heads: LinearHeads, tokens: Sequence[str]) -> NDArray[np.float64]:
    """(heads,) logits of a text's words."""
    whole = heads.logits(tokens)
    return combine(whole, [heads.logits(tokens[start : start + WIDTH]) for start in window_starts(len(tokens))])


def window_starts(count: int) -> list[int]:
    """First words of the windows of a text with ``count`` words; the last window ends with the text."""
    if count <= WIDTH:
        return []
    return [*range(0, count - WIDTH, STRIDE), count - WIDTH]


def combine(whole: NDArray[np.float64], windows: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """(heads,) the larger of the whole text's logits and the windows' less the margin."""
    return np.maximum(whole, np.max(windows, axis=0) - MARGIN) if windows else whole


class GrowingLogits:
    """The logits of a text that grows; every step costs as much as the new text, not as the whole.

    Equal, bit for bit, to :func:`windowed_logits` of all the text so far.
    """

    def __init__(self, heads: LinearHeads) -> None:
        self._heads = heads
        self._word = _Growing(heads.word_table)
        self._char = _Growing(heads.char_table)
        self._pending = ""
        self._tokens: list[str] = []
        self._dropped = 0
        self._passed = 0
        self._highest: list[NDArray[np.float64]] = []

    def extend(self, text: str) -> tuple[NDArray[np.float64], int]:
        """Append text; gives the logits, and the number of words, of everything so far."""
        self._pending += text
        cut = _last_safe_cut(self._pending)
        if cut:
            self._absorb(words(self._pending[:cut]))
            self._pending = self._pending[cut:]
        return self._logits(words(self._pending))

    def _absorb(self, tokens: Sequence[str]) -> None:
        self._word.add(self._word_grams(tokens))
        self._char.add(char_grams(tokens))
        self._tokens += tokens
        count = self._dropped + len(self._tokens)
        for start in range(STRIDE * self._passed, count - WIDTH, STRIDE):
            self._passed += 1
            self._highest = [np.max([*self._highest, self._heads.logits(self._window(self._tokens, start))], axis=0)]
        done = max(0, min(STRIDE * self._passed, count - WIDTH) - self._dropped)
        del self._tokens[:done]
        self._dropped += done

    def _logits(self, tail: Sequence[str]) -> tuple[NDArray[np.float64], int]:
        word = self._word.with_also(self._word_grams(tail))
        char = self._char.with_also(char_grams(tail))
        tokens = [*self._tokens, *tail]
        count = self._dropped + len(tokens)
        windows = [self._window(tokens, start) for start in window_starts(count)[self._passed :]]
        logits = [*self._highest, *map(self._heads.logits, windows)]
        return combine(self._heads.combine(word, char), logits), count

    def _window(self, tokens: Sequence[str], start: int) -> Sequence[str]:
        return tokens[start - self._dropped : start - self._dropped + WIDTH]

    def _word_grams(self, tokens: Sequence[str]) -> NDArray[np.intp]:
        """Of new words and of the pair across the seam."""
        return word_grams(hash_words([*self._tokens[-1:], *tokens]))


class _Growing:
    """The evidence of a growing set of features."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._seen = np.zeros(len(table.idf), dtype=np.bool_)
        self._sum = table.evidence(np.empty(0, dtype=np.intp))

    def add(self, grams: NDArray[np.intp]) -> None:
        self._sum = self.with_also(grams)
        self._seen[grams] = True

    def with_also(self, grams: NDArray[np.intp]) -> Evidence:
        return self._sum + self._table.evidence(grams[~self._seen[grams]])


def _last_safe_cut(text: str) -> int:
    """Where ``text`` can be split without changing its words: before white space that follows two word characters.

    Not elsewhere: "b o m b" is one word, and a combining mark belongs to the character before it.
    """
    for place in range(len(text) - 1, 1, -1):
        if text[place].isspace() and text[place - 1].isalnum() and text[place - 2].isalnum():
            return place
    return 0
