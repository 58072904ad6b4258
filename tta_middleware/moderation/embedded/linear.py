"""Linear heads over hashed features; numpy only.

All sums are sums of integers, hence exact: a text scores the same on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tta_middleware.moderation.embedded.features import char_grams, hash_words, word_grams

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """What a set of features adds up to.

    Attributes:
        sums: (heads,) int64 sums of quantised weights.
        square: sum of squared quantised idf, the square of the feature vector's length.
    """

    sums: NDArray[np.int64]
    square: int


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Quantised weights of one feature group.

    Attributes:
        weights: (buckets, heads) int8; the idf of a bucket is already multiplied in.
        scale: (heads,) float64 that turns sums, over the vector's length, into logits.
        idf: (buckets,) uint8, zero where a bucket was too rare to be used.
    """

    weights: NDArray[np.int8]
    scale: NDArray[np.float64]
    idf: NDArray[np.uint8]

    def evidence(self, grams: NDArray[np.intp]) -> Evidence:
        """Of distinct buckets."""
        idf = self.idf[grams].astype(np.int64)
        return Evidence(self.weights[grams].sum(axis=0, dtype=np.int64), int(idf @ idf))

    def logits(self, evidence: Evidence) -> NDArray[np.float64]:
        """(heads,) contributions; zeros without evidence."""
        length = max(evidence.square, 1) ** 0.5
        return np.asarray(evidence.sums * self.scale / length)


@dataclass(frozen=True, slots=True, eq=False)
class LinearHeads:
    """Several linear models that read the same features."""

    names: tuple[str, ...]
    bias: NDArray[np.float64]
    word_table: Table
    char_table: Table

    def logits(self, tokens: Sequence[str]) -> NDArray[np.float64]:
        """(heads,) logits of a text's words; zero evidence gives the bias."""
        return self.combine(
            self.word_table.evidence(word_grams(hash_words(tokens))), self.char_table.evidence(char_grams(tokens))
        )

    def combine(self, word: Evidence, char: Evidence) -> NDArray[np.float64]:
        """(heads,) logits of the evidence of both groups."""
        return self.bias + self.word_table.logits(word) + self.char_table.logits(char)
