"""The API is down for a minute and comes back: what callers saw, what the breaker did, what it saved.

    python benchmarks/moderation_outage.py [--up 10] [--down 60] [--after 20] [--rate 50] [--without-breaker]

Calls arrive at a steady rate, each with a deadline of 10 s; while the API is down it answers 503. Runs on a real
clock. Prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import anyio

sys.path.insert(0, str(Path(__file__).parent))
from moderation_server import ServerProcess

from tta_middleware.errors import ModerationError
from tta_middleware.moderation.breaker import BreakerSettings
from tta_middleware.moderation.stack import StackSettings, production_moderator, shared_breaker
from tta_middleware.testing.faults import outage as outage_plan

DEADLINE = 10.0


class Callers:
    """Open-loop load: a call every ``1 / rate`` seconds, however the others fare."""

    def __init__(self, moderator: Any) -> None:
        self._moderator = moderator
        self.seen: list[tuple[float, float, str]] = []

    async def run(self, seconds: float, rate: float) -> None:
        self.started = time.monotonic()
        async with anyio.create_task_group() as group:
            for index in range(int(seconds * rate)):
                await anyio.sleep(max(0.0, self.started + index / rate - time.monotonic()))
                group.start_soon(self._call, index)

    async def _call(self, index: int) -> None:
        began = time.monotonic()
        outcome = "deadline"
        with anyio.move_on_after(DEADLINE):
            try:
                await self._moderator.moderate([f"text {index}"])
                outcome = "verdict"
            except ModerationError as error:
                outcome = type(error).__name__
        self.seen.append((began - self.started, time.monotonic() - began, outcome))


def summary(seen: list[tuple[float, float, str]], begin: float, end: float) -> dict[str, Any]:
    """Outcomes and waits of the calls that began in [begin, end) seconds."""
    chosen = sorted((took, outcome) for at, took, outcome in seen if begin <= at < end)
    if not chosen:
        return {}
    return {
        "calls": len(chosen),
        "outcomes": dict(Counter(outcome for _, outcome in chosen)),
        "median_s": round(chosen[len(chosen) // 2][0], 4),
        "max_s": round(chosen[-1][0], 3),
    }


async def outage(arguments: argparse.Namespace) -> dict[str, Any]:
    breaker = None if arguments.without_breaker else BreakerSettings()
    with ServerProcess(outage_plan, arguments.up, arguments.down) as server:
        settings = StackSettings(base_url=server.base_url, breaker=breaker)
        async with production_moderator(settings, api_key="k") as moderator:
            callers = Callers(moderator)
            await moderator.moderate(["warm"])
            await callers.run(arguments.up + arguments.down + arguments.after, arguments.rate)
        sent = server.texts()
    # The server's clock starts with the warm-up request, a moment before the load.
    back = arguments.up + arguments.down
    recovered = min((at + took for at, took, outcome in callers.seen if at + took > back and outcome == "verdict"))
    result = {
        "breaker": not arguments.without_breaker,
        "calls": len(callers.seen),
        "http_requests": len(sent),
        "before": summary(callers.seen, 0.0, arguments.up),
        "down": summary(callers.seen, arguments.up, back),
        "after": summary(callers.seen, back, float("inf")),
        "first_verdict_after_return_s": round(recovered - back, 2),
        "last_failure_after_return_s": round(
            max((at + took - back for at, took, outcome in callers.seen if outcome != "verdict"), default=0.0), 2
        ),
    }
    if breaker:
        state = shared_breaker(server.base_url, breaker)
        result["transitions"] = [
            (round(item.at - callers.started, 2), item.before, item.after) for item in state.transitions
        ]
        result["attempts_refused_by_breaker"] = state.refused
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("up", 10.0), ("down", 60.0), ("after", 20.0), ("rate", 50.0)):
        parser.add_argument(f"--{name}", type=float, default=default)
    parser.add_argument("--without-breaker", action="store_true")
    print(json.dumps(asyncio.run(outage(parser.parse_args())), indent=2))


if __name__ == "__main__":
    main()
