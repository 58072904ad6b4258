"""Maps logits to probabilities by held-out rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

Vector = NDArray[np.float64]
KNOTS = 65
BLEND = 0.15
ISOTONIC_POSITIVES = 400


def calibrate(logits: Vector, targets: Vector, weight: Vector) -> NDArray[np.float64]:
    """(2, k): knots of a strictly increasing map, logits over probabilities.

    Platt's sigmoid where positives are few; otherwise isotonic regression, with a little of the sigmoid added so
    that no two logits share a score (plateaus would leave a search without a slope).
    """
    slope, offset = _platt(logits, targets, weight)
    span = logits.min() - 4.0, logits.max() + 4.0
    knots = np.linspace(*span, KNOTS)
    sigmoid = 1 / (1 + np.exp(-(slope * knots + offset)))
    if (targets * (weight > 0)).sum() < ISOTONIC_POSITIVES:
        return np.stack([knots, sigmoid])
    isotonic = IsotonicRegression(out_of_bounds="clip", y_min=0.0, y_max=1.0)
    isotonic.fit(logits, targets, sample_weight=weight)
    smooth = np.stack([isotonic.predict(knots + shift) for shift in np.linspace(-0.4, 0.4, 9)]).mean(axis=0)
    return np.stack([knots, (1 - BLEND) * smooth + BLEND * sigmoid])


def shifted(knots: NDArray[np.float64], middle: float) -> NDArray[np.float64]:
    """(2, k): the same map for another share of positives, the one at which ``middle`` gets 0.5.

    Odds are divided by a constant (Elkan 2001, "The foundations of cost-sensitive learning", theorem 2): the order of
    texts stays.
    """
    odds = np.clip(knots[1], 1e-4, 1 - 1e-4)
    odds = odds / (1 - odds)
    logits = np.log(odds) - np.interp(middle, knots[0], np.log(odds))
    return np.stack([knots[0], 1 / (1 + np.exp(-logits))])


def subdued(knots: NDArray[np.float64]) -> NDArray[np.float64]:
    """(2, k): the same map with scores under a half cubed, and times four.

    The categories are calibrated on a set where up to a quarter of the texts belong to each. Among answers few do, and
    a category's 0.1 would drown what harm says below its half. The half itself, and the order of texts, stay.
    """
    low = knots[1] < 0.5
    return np.stack([knots[0], np.where(low, 4 * knots[1] ** 3, knots[1])])


def _platt(logits: Vector, targets: Vector, weight: Vector) -> tuple[float, float]:
    column = np.concatenate([logits, logits])[:, None]
    share = np.concatenate([weight * targets, weight * (1 - targets)])
    model = LogisticRegression(C=1e4, tol=1e-8, max_iter=1000)
    model.fit(column, np.repeat([1, 0], len(logits)), sample_weight=share)
    # A calibration must not turn a head around, however few its positives.
    return max(float(model.coef_[0, 0]), 1e-3), float(model.intercept_[0])


def expected_calibration_error(probabilities: Vector, targets: Vector, bins: int = 10) -> float:
    """Mean gap between predicted and observed rate over ten equally wide bins (Guo et al. 2017)."""
    place = np.minimum((probabilities * bins).astype(int), bins - 1)
    gaps = [
        abs(probabilities[place == b].mean() - targets[place == b].mean()) * (place == b).mean()
        for b in range(bins)
        if (place == b).any()
    ]
    return float(sum(gaps))
