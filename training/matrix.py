"""Sparse feature matrices of many texts: the features of the package, idf weights, unit rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from sklearn.preprocessing import normalize

from tta_middleware.moderation.embedded.features import CHAR_BITS, WORD_BITS, char_grams, hash_words, word_grams
from tta_middleware.moderation.embedded.text import words

MIN_TEXTS = 2


@dataclass(frozen=True, slots=True, eq=False)
class Matrices:
    """(texts, buckets) presence of word grams and of character grams."""

    word: sp.csr_matrix
    char: sp.csr_matrix

    def rows(self, index: NDArray[np.intp]) -> Matrices:
        return Matrices(self.word[index], self.char[index])


def matrices(texts: Sequence[str]) -> Matrices:
    """Presence matrices, one row a text."""
    return matrices_of([words(text) for text in texts])


def matrices_of(tokens: Sequence[Sequence[str]]) -> Matrices:
    """As :func:`matrices`, for texts that are already split into words."""
    return Matrices(
        stack([word_grams(hash_words(row)) for row in tokens], 2**WORD_BITS),
        stack([char_grams(row) for row in tokens], 2**CHAR_BITS),
    )


def stack(grams: Sequence[NDArray[np.intp]], width: int) -> sp.csr_matrix:
    """(texts, width) ones at each text's buckets."""
    ends = np.concatenate(([0], np.cumsum([len(row) for row in grams])))
    columns = np.concatenate(grams)
    return sp.csr_matrix((np.ones(len(columns), np.float32), columns, ends), shape=(len(grams), width))


def idf(presence: sp.csr_matrix) -> NDArray[np.uint8]:
    """Smooth inverse document frequency per bucket in steps of 1/16; zero for buckets in fewer than two texts.

    The artifact stores these very numbers: training sees what scoring will see.
    """
    texts = np.asarray(presence.sum(axis=0)).ravel()
    weights = np.log((1 + presence.shape[0]) / (1 + texts)) + 1
    weights[texts < MIN_TEXTS] = 0
    return np.rint(weights * 16).clip(0, 255).astype(np.uint8)


def design(data: Matrices, word_idf: NDArray[np.uint8], char_idf: NDArray[np.uint8], mix: float) -> sp.csr_matrix:
    """(texts, word buckets + char buckets): each group of unit length, characters scaled by ``mix``."""
    word = normalize(data.word @ sp.diags(word_idf.astype(np.float32)))
    char = normalize(data.char @ sp.diags(char_idf.astype(np.float32))) * mix
    return sp.hstack([word, char], format="csr", dtype=np.float32)
