"""From logits of the heads to calibrated scores of the 13 categories."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tta_middleware.types import CATEGORIES

if TYPE_CHECKING:
    from numpy.typing import NDArray

DIRECT = ("harassment", "hate", "hate/threatening", "self-harm", "sexual", "violence")
TOPICS: Mapping[str, tuple[str, ...]] = {
    "topic/illicit": ("illicit",),
    "topic/violent": ("illicit/violent", "illicit"),
    "topic/hate": ("hate", "harassment"),
    "topic/sexual": ("sexual",),
}
"""Which categories carry the harm of an answer on a topic. ``illicit`` includes ``illicit/violent``."""

UNSUPPORTED = frozenset(
    {"harassment/threatening", "self-harm/instructions", "self-harm/intent", "sexual/minors", "violence/graphic"}
)
"""Categories without enough labelled rows to train or to measure. Their score is always 0; the parent category
(``harassment``, ``self-harm``, ``sexual``, ``violence``) covers such texts. Documented in the model card."""


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """A monotone map from logits to probabilities, piecewise linear between knots.

    Attributes:
        logits: (k,) increasing.
        probabilities: (k,) non-decreasing, in [0, 1].
    """

    logits: NDArray[np.float64]
    probabilities: NDArray[np.float64]

    def __call__(self, logit: float) -> float:
        return float(np.interp(logit, self.logits, self.probabilities))


def category_scores(logits: Mapping[str, float], calibrations: Mapping[str, Calibration]) -> dict[str, float]:
    """Scores of all 13 categories.

    A category's score is the larger of two: its own head, and the probability that the text answers a harmful
    request, given to the categories of the likeliest topic and, in proportion, to those of the others.
    """
    scores = dict.fromkeys(CATEGORIES, 0.0)
    for category in DIRECT:
        scores[category] = calibrations[category](logits[category])
    harm = calibrations["harm"](logits["harm"])
    for topic, share in _shares(logits).items():
        for category in TOPICS[topic]:
            scores[category] = max(scores[category], harm * share)
    scores["hate/threatening"] = min(scores["hate/threatening"], scores["hate"])
    return scores


def _shares(logits: Mapping[str, float]) -> dict[str, float]:
    """Odds of every topic relative to the likeliest, which gets 1."""
    top = max(logits[topic] for topic in TOPICS)
    return {topic: math.exp(logits[topic] - top) for topic in TOPICS}
