"""What is chosen where nobody says otherwise; imports nothing, so that a command can start with it."""

from __future__ import annotations

import os
import sys

DEFAULT_METHOD = "race"
"""How flagged answers are repaired: what measured best; see the results table in the README."""

JUDGE_FALSE_ALARMS = 0.02
"""The share of harmless answers, of a source that its probe has not seen, that a judge is fitted to flag; what it is
elsewhere stands in docs/decisions/014."""

WAIT_POLICY, PASSIVE = "OMP_WAIT_POLICY", "PASSIVE"
"""The environment variable that says how OpenMP threads wait for each other, and what it should say."""

# The second is how often GNU's library looks before a thread sleeps, which overrules the first where it is known.
_WAITING = {WAIT_POLICY: PASSIVE, "GOMP_SPINCOUNT": "10000"}


def openmp_settings() -> dict[str, str]:
    """What the environment lacks for threads that wait briefly; nothing if the user chose otherwise or it is too late.

    Threads that spin for long stall small matrix products to 8 ms each when another process wants the core; those that
    sleep at once double the time of a decode step on idle cores (docs/decisions/008). OpenMP reads its settings only
    when its library loads, with torch.
    """
    chosen = os.environ.get(WAIT_POLICY, PASSIVE).upper()
    if "torch" in sys.modules or chosen != PASSIVE or "GOMP_SPINCOUNT" in os.environ:
        return {}
    return {name: value for name, value in _WAITING.items() if name not in os.environ}
