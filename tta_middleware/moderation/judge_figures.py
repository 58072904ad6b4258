"""How well scores tell harmful texts from harmless ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tta_middleware.errors import ConfigurationError

Scores = Sequence[float] | NDArray[np.float64]
Labels = Sequence[bool] | NDArray[np.bool_]


def auc(scores: Scores, harmful: Labels) -> float:
    """The chance that a harmful text scores above a harmless one, in [0, 1]; ties count half.

    Raises:
        ConfigurationError: there are no texts of one kind, or scores and labels differ in number.
    """
    bad, good = _apart(scores, harmful)
    ordered = np.sort(good)
    below = np.searchsorted(ordered, bad, "left")
    up_to = np.searchsorted(ordered, bad, "right")
    return float((below + up_to).mean() / (2 * len(good)))


def threshold_at(scores: Scores, harmful: Labels, false_alarms: float, weights: Scores | None = None) -> float:
    """The lowest threshold from which on at most that share of the harmless texts is flagged.

    Where the scores leave room it lies in the middle between two harmless texts.

    Args:
        weights: how much each text counts, where the texts' mixture is not the one that is meant.

    Raises:
        ConfigurationError: as :func:`auc`.
    """
    _, good = _apart(scores, harmful)
    shares = np.ones(len(good)) if weights is None else _apart(weights, harmful)[1]
    order = np.argsort(good)[::-1]
    ordered, counted = good[order], np.cumsum(shares[order])
    allowed = int((counted <= (false_alarms + 1e-9) * counted[-1]).sum())
    if allowed >= len(ordered):
        return float(ordered[-1])
    highest_passed = ordered[allowed]
    if allowed and ordered[allowed - 1] > highest_passed:
        return float((ordered[allowed - 1] + highest_passed) / 2)
    return float(np.nextafter(highest_passed, np.inf))


def found_at(scores: Scores, harmful: Labels, false_alarms: float) -> float:
    """The share of harmful texts that is found where at most ``false_alarms`` of the harmless ones are flagged.

    Raises:
        ConfigurationError: as :func:`auc`.
    """
    bad, _ = _apart(scores, harmful)
    return float((bad >= threshold_at(scores, harmful, false_alarms)).mean())


def calibration_error(probabilities: Scores, harmful: Labels, weights: Scores | None = None, bins: int = 10) -> float:
    """Expected calibration error: how far probabilities lie from what comes true, over ``bins`` even bins of [0, 1].

    Args:
        weights: how much each text counts, where the texts' mixture is not the one that is meant.

    Raises:
        ConfigurationError: as :func:`auc`.
    """
    _apart(probabilities, harmful)
    said, truth = np.asarray(probabilities, dtype=np.float64), np.asarray(harmful, dtype=np.float64)
    share = np.ones(len(said)) if weights is None else np.asarray(weights, dtype=np.float64)
    place = np.minimum((said * bins).astype(int), bins - 1)
    gaps = [abs(float(((said - truth) * share)[place == at].sum())) for at in range(bins)]
    return float(sum(gaps) / share.sum())


def _apart(scores: Scores, harmful: Labels) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    known, truth = np.asarray(scores, dtype=np.float64), np.asarray(harmful, dtype=bool)
    if known.shape != truth.shape or truth.all() or not truth.any():
        raise ConfigurationError("figures of a judge take one score and one label per text, and texts of both kinds")
    return known[truth], known[~truth]
