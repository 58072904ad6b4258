"""The independent judge ``local-b``: a second opinion for reports, never an objective.

It has another learner, other features and other sources of data than the moderator, and deliberately no ``moderate``:
an object that a search can be given would sooner or later be optimised against.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tta_middleware.moderation.embedded.artifact import load
from tta_middleware.moderation.embedded.features import hash_words, hashed_runs, skip_pairs
from tta_middleware.moderation.embedded.text import words
from tta_middleware.types import Verdict

if TYPE_CHECKING:
    from numpy.typing import NDArray

ARTIFACT = "local_b.npz"
MODEL = "tta-local-b-2"
BITS = 17
ORDERS = (6, 8)
THRESHOLD = 0.5


class EmbeddedJudge:
    """Scores finished answers as ``harm`` (answers a harmful request) and ``toxicity``; English only."""

    name = "local-b"

    def assess(self, texts: Sequence[str]) -> list[Verdict]:
        """One verdict per text, in order; a text without words scores 0.

        Raises:
            ConfigurationError: the artifact cannot be read.
        """
        return [_verdict(text) for text in texts]


def judge_grams(tokens: Sequence[str]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Distinct buckets below ``2**BITS``: pairs of words with one between, and 6- and 8-byte runs across words."""
    line = " ".join(tokens).encode("utf-8", "surrogatepass")
    runs = [hashed_runs(np.frombuffer(line, dtype=np.uint8), order, BITS) for order in ORDERS]
    return skip_pairs(hash_words(tokens), BITS), np.unique(np.concatenate(runs))


def _verdict(text: str) -> Verdict:
    artifact = load(ARTIFACT)
    heads = artifact.heads
    tokens = words(text)
    scores = dict.fromkeys(heads.names, 0.0)
    if tokens:
        pairs, runs = judge_grams(tokens)
        logits = heads.combine(heads.word_table.evidence(pairs), heads.char_table.evidence(runs)).tolist()
        scores = {name: artifact.calibrations[name](value) for name, value in zip(heads.names, logits, strict=True)}
    return Verdict(scores=scores, flagged=max(scores.values()) >= THRESHOLD, model=MODEL)
