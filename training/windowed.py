"""Logits of many texts as the package gives them: whole texts and their windows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from training.fit import Linear
from training.matrix import Matrices, matrices_of
from tta_middleware.moderation.embedded.features import hash_words
from tta_middleware.moderation.embedded.text import words
from tta_middleware.moderation.embedded.vectors import WordVectors
from tta_middleware.moderation.embedded.windows import MARGIN, WIDTH, window_starts


class Windowed:
    """Feature matrices of texts and of their windows, computed once for many models."""

    def __init__(self, texts: Sequence[str]) -> None:
        pieces, self._ends = [], [0]
        for text in texts:
            tokens = words(text)
            pieces.append(tokens)
            pieces += [tokens[start : start + WIDTH] for start in window_starts(len(tokens))]
            self._ends.append(len(pieces))
        self._data: Matrices = matrices_of(pieces)
        self._hashes = [hash_words(tokens) for tokens in pieces]

    def logits(self, model: Linear, vectors: WordVectors | None, index: Sequence[int]) -> NDArray[np.float64]:
        """(len(index), heads) for the texts at ``index``."""
        spans = [np.arange(self._ends[i], self._ends[i + 1]) for i in index]
        pieces = np.concatenate(spans)
        flat = model.logits(self._data.rows(pieces))
        if vectors is not None:
            flat[:, 0] += [vectors.logit(self._hashes[piece]) for piece in pieces]
        starts = np.concatenate(([0], np.cumsum([len(span) for span in spans])[:-1]))
        # The whole text stands first in its span; adding the margin keeps it ahead of its windows' allowance.
        flat[starts] += MARGIN
        return np.asarray(np.maximum.reduceat(flat, starts, axis=0) - MARGIN)
