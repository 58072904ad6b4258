"""What hedging does to the slow end: p50 and p99 of calls of which a few are very slow, and what it costs in requests.

    python benchmarks/moderation_hedging.py [--calls 3000] [--at-once 16] [--share 0.01] [--slow 1.0] [--slots 16 24]

Answers of a scripted moderator take some 80 ms (lognormal), but for a share that takes ``--slow`` seconds more. A hedge
takes a slot in flight, so there have to be more of them than callers. Time is virtual: no machine's load blurs the
figures, and every run gives the same. Prints Markdown.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator

import anyio
import numpy as np

from tta_middleware.moderation.hedge import Hedged
from tta_middleware.moderation.limits import Limited, Limiter, RateLimits
from tta_middleware.protocols import Moderator
from tta_middleware.testing.scripted_moderator import ScriptedModerator
from tta_middleware.testing.virtual_time import now, run_in_virtual_time


class SlowNowAndThen:
    """A moderator's gate: waits as long as the next answer takes, and notes how many are under way at most."""

    def __init__(self, share: float, seconds: float) -> None:
        self._share, self._seconds, self._rng = share, seconds, random.Random(1)
        self.inner = ScriptedModerator(gate=self.wait)
        self.most = 0

    async def wait(self) -> None:
        self.most = max(self.most, self.inner.in_flight)
        late = self._seconds if self._rng.random() < self._share else 0.0
        await anyio.sleep(0.08 * self._rng.lognormvariate(0.0, 0.3) + late)


async def caller(moderator: Moderator, texts: Iterator[str], took: list[float]) -> None:
    for text in texts:
        began = now()
        await moderator.moderate([text])
        took.append(now() - began)


async def measure(arguments: argparse.Namespace, slots: int, hedged: bool) -> str:
    """A row of the table."""
    took: list[float] = []
    server = SlowNowAndThen(arguments.share, arguments.slow)
    limiter = Limiter(RateLimits(max_in_flight=slots), clock=now)
    inner = Hedged(server.inner, admit=lambda _texts: limiter.try_admit(1), clock=now) if hedged else server.inner
    moderator = Limited(inner, limiter)
    texts = iter([f"text {index}" for index in range(arguments.calls)])
    async with anyio.create_task_group() as group:
        for _ in range(arguments.at_once):
            group.start_soon(caller, moderator, texts, took)
    more = len(server.inner.calls) - len(took)
    p50, p99, p995 = np.quantile(took, [0.5, 0.99, 0.995])
    return f"| {'on' if hedged else 'off'} | {slots} | {p50:.3f} | {p99:.3f} | {p995:.3f} | {more} | {server.most} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=3000)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--share", type=float, default=0.01)
    parser.add_argument("--slow", type=float, default=1.0)
    parser.add_argument("--slots", type=int, nargs="+", default=[16, 24])
    arguments = parser.parse_args()
    print("| hedging | `max_in_flight` | p50 (s) | p99 (s) | p99.5 (s) | further requests | most at once |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for hedged in (False, True):
        for slots in arguments.slots:
            print(run_in_virtual_time(measure(arguments, slots, hedged)), flush=True)


if __name__ == "__main__":
    main()
