"""Small statistics, so that a summary needs no heavy library."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

_Z95 = statistics.NormalDist().inv_cdf(0.975)


def wilson(successes: float, trials: int) -> tuple[float, float] | None:
    """The 95% Wilson score interval of a share (Wilson 1927); None without trials.

    ``successes`` need not be whole: with several seeds a prompt counts as one trial with the mean of its outcomes,
    since the answers to one prompt are not independent.
    """
    if trials == 0:
        return None
    share, z2 = successes / trials, _Z95 * _Z95
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    spread = _Z95 * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials * trials)) / (1 + z2 / trials)
    # At the ends the formula gives 0 and 1 exactly; rounding must not leave [0, 1].
    low = 0.0 if successes == 0 else centre - spread
    return low, 1.0 if successes == trials else centre + spread


def mean(values: Sequence[float]) -> float | None:
    """The arithmetic mean; None without values."""
    return statistics.fmean(values) if values else None


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value below which ``share`` of the values lie, interpolated linearly; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
