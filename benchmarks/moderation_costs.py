"""Calls and characters saved by coalescing, the price of a cache hit, and what cancelling leaves behind.

    python benchmarks/moderation_costs.py [coalescing] [cache] [cancel]

Prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio

sys.path.insert(0, str(Path(__file__).parent))
from moderation_server import ServerProcess

from tta_middleware.moderation.cache import Cached
from tta_middleware.moderation.coalesce import Coalescing
from tta_middleware.moderation.limits import Limited, Limiter, RateLimits
from tta_middleware.moderation.openai import OpenAIModerator
from tta_middleware.protocols import Moderator
from tta_middleware.testing.faults import Fault, Plan, always
from tta_middleware.testing.scripted_moderator import ScriptedModerator

REPAIRS, CANDIDATES, CHARACTERS = 32, 8, 400


def waves(share: float) -> list[list[str]]:
    """One wave of candidates per repair; a ``share`` of all candidates are one of four degenerate answers."""
    rng = random.Random(7)

    def text() -> str:
        if rng.random() < share:
            return f"{rng.randrange(4)}. " * (CHARACTERS // 3)
        return "".join(rng.choices("abcdefgh ", k=CHARACTERS))

    return [[text() for _ in range(CANDIDATES)] for _ in range(REPAIRS)]


async def repair(moderator: Moderator, wave: list[str], start: float, one_by_one: bool) -> None:
    await anyio.sleep(start)
    for texts in [[text] for text in wave] if one_by_one else [wave]:
        await moderator.moderate(texts)


async def spent(
    base_url: str, wrap: Callable[[Moderator], Moderator], spread: float, share: float, one_by_one: bool = False
) -> None:
    rng = random.Random(3)
    async with OpenAIModerator(base_url=base_url, api_key="k") as client:
        await client.moderate(["warm"])
        moderator = wrap(client)
        async with anyio.create_task_group() as group:
            for wave in waves(share):
                group.start_soon(repair, moderator, wave, rng.uniform(0.0, spread), one_by_one)


def coalescing() -> dict[str, Any]:
    variants: dict[str, tuple[Callable[[Moderator], Moderator], bool]] = {
        "a call per candidate": (lambda client: client, True),
        "a list per repair": (lambda client: client, False),
        "coalesced": (lambda client: Coalescing(client, reads_prompt=False), False),
        "coalesced and cached": (
            lambda client: Cached(Coalescing(client, reads_prompt=False), reads_prompt=False),
            False,
        ),
    }
    results: dict[str, Any] = {}
    for spread, share in ((0.0, 0.0), (0.0, 0.25), (0.2, 0.25)):
        row = results[f"starts spread over {spread * 1000:.0f} ms, {share:.0%} degenerate"] = {}
        for name, (wrap, one_by_one) in variants.items():
            with ServerProcess(always) as server:
                asyncio.run(spent(server.base_url, wrap, spread, share, one_by_one))
                sent = server.texts()[1:]
            row[name] = {"calls": len(sent), "characters": sum(len(text) for texts in sent for text in texts)}
    return results


def cache() -> dict[str, Any]:
    async def measure(count: int, length: int) -> float:
        moderator = Cached(ScriptedModerator())
        texts = [f"{index:04d}" + "x" * (length - 4) for index in range(count)]
        await moderator.moderate(texts)
        best = float("inf")
        for _ in range(5):
            started = time.perf_counter()
            for _ in range(2000):
                await moderator.moderate(texts)
            best = min(best, (time.perf_counter() - started) / 2000)
        return round(best * 1e6, 1)

    return {
        f"{count} x {length} characters": asyncio.run(measure(count, length))
        for count, length in ((1, 100), (1, 1000), (1, 10_000), (8, 1000))
    }


def hang() -> Plan:
    return always(Fault("hang"))


async def _cancel(server: ServerProcess, make: Callable[[], tuple[Moderator, Limiter]], calls: int) -> dict[str, Any]:
    before = (asyncio.all_tasks(), _sockets())
    moderator, limiter = make()
    tasks = [asyncio.create_task(moderator.moderate([f"text {index}"])) for index in range(calls)]
    # Polled, since the server is in another process.
    while len(await asyncio.to_thread(server.texts)) + limiter.waiting < calls:  # noqa: ASYNC110
        await anyio.sleep(0.05)
    at_work = {"requests_in_flight": server.connections(), "sockets": _sockets(), "waiting": limiter.waiting}
    started = time.perf_counter()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    seconds = time.perf_counter() - started
    left = {
        "tasks": len(asyncio.all_tasks() - before[0]),
        "sockets": _sockets() - before[1],
        "slots": limiter.in_flight,
        "waiting": limiter.waiting,
    }
    await moderator.aclose()
    return {
        "at_work": at_work,
        "cancelled": sum(task.cancelled() for task in tasks),
        "seconds": round(seconds, 2),
        "left": left,
    }


def cancel() -> dict[str, Any]:
    results = {}
    for name, limits in (
        ("1000 in flight", RateLimits(max_in_flight=1000)),
        ("500 in flight, 500 waiting", RateLimits(requests_per_minute=60, burst_seconds=500.0)),
    ):
        with ServerProcess(hang) as server:

            def make(base_url: str = server.base_url, limits: RateLimits = limits) -> tuple[Moderator, Limiter]:
                limiter = Limiter(limits)
                return Cached(Limited(OpenAIModerator(base_url=base_url, api_key="k", timeout=60.0), limiter)), limiter

            results[name] = asyncio.run(_cancel(server, make, 1000))
    return results


def _sockets() -> int:
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            count += str(link.readlink()).startswith("socket:")
        except OSError:
            continue
    return count


def main() -> None:
    parts: dict[str, Callable[[], Any] | Callable[[], Awaitable[Any]]] = {
        "coalescing": coalescing,
        "cache": cache,
        "cancel": cancel,
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(parts))
    for part in parser.parse_args().parts:
        print(json.dumps({part: parts[part]()}, indent=2), flush=True)


if __name__ == "__main__":
    main()
