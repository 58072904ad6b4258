"""What hedging does to the slow end: p50 and p99 of calls of which a few are very slow, and what it costs in requests.

    python benchmarks/moderation_hedging.py [--calls 3000] [--at-once 16] [--share 0.01] [--slow 1.0] [--slots 16 24]

Calls go over loopback HTTP to a server whose answers take some 80 ms (lognormal), but for a share that takes ``--slow``
seconds more. A hedge takes a slot in flight, so there have to be more of them than callers. Prints Markdown.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from moderation_server import ServerProcess

from tta_middleware.moderation.hedge import HedgeSettings
from tta_middleware.moderation.limits import RateLimits
from tta_middleware.moderation.stack import StackSettings, production_moderator
from tta_middleware.protocols import Moderator
from tta_middleware.testing.faults import Fault, Plan, lognormal, mixed


def slow_now_and_then(share: float, seconds: float) -> Plan:
    """A share of the answers comes that many seconds late."""
    return mixed(share, [Fault(latency=seconds)], seed=1, latency=lognormal(0.08, 0.3))


async def caller(moderator: Moderator, texts: Iterator[str], took: list[float]) -> None:
    for text in texts:
        began = time.perf_counter()
        await moderator.moderate([text])
        took.append(time.perf_counter() - began)


async def measure(arguments: argparse.Namespace, slots: int, hedge: HedgeSettings | None) -> str:
    """A row of the table."""
    took: list[float] = []
    with ServerProcess(slow_now_and_then, arguments.share, arguments.slow) as server:
        settings = StackSettings(
            base_url=server.base_url, coalescing=None, cache=None, limits=RateLimits(max_in_flight=slots), hedge=hedge
        )
        async with production_moderator(settings, api_key="k") as moderator:
            texts = iter([f"text {index}" for index in range(arguments.calls)])
            async with anyio.create_task_group() as group:
                for _ in range(arguments.at_once):
                    group.start_soon(caller, moderator, texts, took)
        more = len(server.texts()) - len(took)
    p50, p99, p995 = np.quantile(took, [0.5, 0.99, 0.995])
    return f"| {'on' if hedge else 'off'} | {slots} | {p50:.3f} | {p99:.3f} | {p995:.3f} | {more} |"


async def table(arguments: argparse.Namespace) -> None:
    print("| hedging | `max_in_flight` | p50 (s) | p99 (s) | p99.5 (s) | further requests |")
    print("|---|---:|---:|---:|---:|---:|")
    for hedge in (None, HedgeSettings()):
        for slots in arguments.slots:
            print(await measure(arguments, slots, hedge), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=3000)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--share", type=float, default=0.01)
    parser.add_argument("--slow", type=float, default=1.0)
    parser.add_argument("--slots", type=int, nargs="+", default=[16, 24])
    asyncio.run(table(parser.parse_args()))


if __name__ == "__main__":
    main()
