"""Where a cheap moderator is sure enough that a judging model need not be asked: per threshold, two scores.

Chosen on labelled answers that both have scored, so that next to nothing is lost which the model alone would find, and
no alarm is raised which it would not raise. ``benchmarks/cascade_bounds.py`` chooses those that are shipped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import resources
from typing import Annotated, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from tta_middleware.config import Settings
from tta_middleware.errors import ConfigurationError

THRESHOLDS: Final = (0.1, 0.2, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
LOST: Final = 0.01
"""Of the harmful answers that the model alone would flag, the share that the cheap one may take for harmless."""
ADDED: Final = 0.0
"""Of the harmless answers, the share that the cheap one may take for harmful where the model alone would not: texts
that it is sure to be harmful are rare, so they save few second looks, and each false one costs a repair."""

LEAST_FOUND: Final = 100
"""Harmful answers that the model flags at a threshold, for a bound to be chosen there; with fewer the next lower
threshold's counts. 1% of 30 is none, and the lowest of 30 scores says little of the next 30."""

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class SureOutside(Settings):
    """The bounds for one threshold: sure of no below ``low``, sure of yes from ``high`` on (None: never)."""

    threshold: Share
    low: Share
    high: Share | None = None

    @model_validator(mode="after")
    def _around(self) -> SureOutside:
        if not self.low <= self.threshold <= (1.0 if self.high is None else self.high):
            raise ValueError("low lies at or below the threshold, and high at or above it")
        return self


class CascadeBounds(Settings):
    """Bounds for several thresholds.

    Attributes:
        first: fingerprint of the cheap moderator that they were chosen for.
        judge: the judging model, for people.
        at: one entry per threshold, in rising order; both bounds rise with it.
        measured: what they are worth at the threshold of 0.5, on the answers that they were chosen on.
    """

    version: Literal[1] = 1
    first: str
    judge: str = ""
    at: tuple[SureOutside, ...]
    measured: dict[str, float] = Field(default_factory=dict)

    def around(self, thresholds: Iterable[float]) -> tuple[float, float | None]:
        """The bounds that hold for every one of these thresholds.

        Between two that were measured the stricter bound counts. Below the lowest nothing is sure to be harmless, and
        above the highest nothing to be harmful.
        """
        found = [self._around(threshold) for threshold in thresholds]
        highs = [high for _, high in found]
        sure_of_yes = [high for high in highs if high is not None]
        low = min((low for low, _ in found), default=0.0)
        return low, max(sure_of_yes) if sure_of_yes and len(sure_of_yes) == len(highs) else None

    def _around(self, threshold: float) -> tuple[float, float | None]:
        below = [one for one in self.at if one.threshold <= threshold + 1e-9]
        above = [one for one in self.at if one.threshold >= threshold - 1e-9]
        return below[-1].low if below else 0.0, above[0].high if above else None


def choose_bounds(
    first: Sequence[float] | NDArray[np.float64],
    judge: Sequence[float] | NDArray[np.float64],
    harmful: Sequence[bool] | NDArray[np.bool_],
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    lost: float = LOST,
    added: float = ADDED,
    least_found: int = LEAST_FOUND,
) -> tuple[SureOutside, ...]:
    """The widest bounds by the scores that a cheap moderator and a judging model gave the same labelled answers.

    Raises:
        ConfigurationError: the three differ in number, or there are no answers of one kind.
    """
    cheap, said, truth = np.asarray(first, float), np.asarray(judge, float), np.asarray(harmful, bool)
    if not (cheap.shape == said.shape == truth.shape) or truth.all() or not truth.any():
        raise ConfigurationError("bounds are chosen on two scores and a label per answer, and answers of both kinds")
    found: list[tuple[float, float, float]] = []
    for threshold in sorted(thresholds):
        kept = np.sort(cheap[truth & (said >= threshold)])
        enough = len(kept) >= max(1, least_found)
        low = float(kept[int(lost * len(kept))]) if enough else found[-1][1] if found else 0.0
        passed = np.sort(cheap[~truth & (said < threshold)])[::-1]
        allowed = int(added * int((~truth).sum()))
        high = float(np.nextafter(passed[allowed], 2.0)) if allowed < len(passed) else threshold
        found.append((threshold, min(low, threshold), max(high, threshold)))
    # A stricter threshold is never left with less certainty than a looser one would need.
    lows = np.minimum.accumulate([low for _, low, _ in found][::-1])[::-1]
    highs = np.maximum.accumulate([high for _, _, high in found])
    return tuple(
        SureOutside(threshold=threshold, low=_down(low), high=None if high >= 1.0 else _up(high))
        for (threshold, _, _), low, high in zip(found, lows, highs, strict=True)
    )


def _down(score: float) -> float:
    found = float(np.floor(score * 1e4) / 1e4)
    return found if found <= score else round(found - 1e-4, 4)


def _up(score: float) -> float:
    found = float(np.ceil(score * 1e4) / 1e4)
    # The product is rounded as well: what lies just above a step of this scale would land on it.
    return min(1.0, found if found >= score else round(found + 1e-4, 4))


@cache
def shipped_bounds() -> CascadeBounds:
    """Those that come with the package, for models that have none of their own."""
    file = resources.files("tta_middleware") / "data" / "cascade.json"
    return CascadeBounds(**json.loads(file.read_text(encoding="utf-8")))
