"""Chaos run: moderated requests at fixed concurrency against an API with 30% mixed faults.

    python benchmarks/moderation_chaos.py [CONTENDER ...] [--requests 5000] [--concurrency 64] [--limit 60]

Contenders: ours (one request a call), ours-coalescing, ours-retry-invalid, ours-fallback, sdk, sdk-timeout,
langchain, langchain-timeout. ``sdk`` and ``langchain`` run as they come (two retries, 600 s timeout); ``-timeout``
gives them the same timeout per attempt as ours. The last two need langchain-openai. Prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from moderation_server import ServerProcess

from tta_middleware.errors import ModerationError
from tta_middleware.moderation.retry import RetryPolicy
from tta_middleware.moderation.stack import StackSettings, production_moderator
from tta_middleware.testing.faults import UNAVAILABLE, Fault, Plan, lognormal, mixed, rate_limited
from tta_middleware.testing.scripted_moderator import ScriptedModerator

TIMEOUT = 1.0
PASSING = [
    UNAVAILABLE,
    Fault("status", status=500),
    Fault("status", status=429),
    rate_limited(0.2),
    Fault("reset"),
    Fault("hang"),
    Fault("drip", drip=0.05),
]
UNUSABLE = [Fault(kind) for kind in ("truncated", "html", "nan", "missing_category", "wrong_length")]
Check = Callable[[str], Awaitable[bool]]


def plan(seed: int) -> Plan:
    """30% faults, 7 of 12 kinds passing and 5 of 12 unusable answers; latencies around 30 ms with a long tail."""
    return mixed(0.3, PASSING + UNUSABLE, seed=seed, latency=lognormal(0.03))


def ours(base_url: str, kind: str) -> tuple[Check, Callable[[], Awaitable[None]]]:
    settings = StackSettings(
        base_url=base_url,
        timeout=TIMEOUT,
        retry=RetryPolicy(base_delay=0.05, max_delay=2.0, invalid_answers=kind == "ours-retry-invalid"),
        **({} if kind == "ours-coalescing" else {"coalescing": None}),
    )
    fallback = ScriptedModerator("fallback") if kind == "ours-fallback" else None
    moderator = production_moderator(settings, api_key="k", fallback=fallback)

    async def check(text: str) -> bool:
        verdict = (await moderator.moderate([text]))[0]
        return verdict.score >= moderator.default_threshold

    return check, moderator.aclose


def sdk(base_url: str, kind: str) -> tuple[Check, Callable[[], Awaitable[None]]]:
    import openai

    options = {"timeout": TIMEOUT} if kind.endswith("timeout") else {}
    client = openai.AsyncOpenAI(base_url=base_url, api_key="k", **options)

    async def check(text: str) -> bool:
        answer = await client.moderations.create(model="omni-moderation-latest", input=text)
        return answer.results[0].flagged

    return check, client.close


def langchain(base_url: str, kind: str) -> tuple[Check, Callable[[], Awaitable[None]]]:
    import openai
    from langchain_core.messages import AIMessage
    from langchain_openai.middleware import OpenAIModerationMiddleware

    options = {"timeout": TIMEOUT} if kind.endswith("timeout") else {}
    client = openai.AsyncOpenAI(base_url=base_url, api_key="k", **options)
    middleware = OpenAIModerationMiddleware(async_client=client)

    async def check(text: str) -> bool:
        return await middleware.aafter_model({"messages": [AIMessage(text)]}, None) is not None

    return check, client.close


class Run:
    """One contender's run: what became of each text, and when."""

    def __init__(self, check: Check, requests: int, concurrency: int) -> None:
        rng = random.Random(1)
        self.texts = [f"{'flagme ' if rng.random() < 0.5 else ''}text {index}" for index in range(requests)]
        self.outcomes: dict[str, str] = {}
        self.latencies: list[float] = []
        self._check = check
        self._concurrency = concurrency

    async def go(self, limit: float) -> float:
        """Seconds until all texts were answered for, ``limit`` at most."""
        started = time.perf_counter()
        queue = iter(self.texts)
        workers = [asyncio.create_task(self._work(queue)) for _ in range(self._concurrency)]
        await asyncio.wait(workers, timeout=limit)
        seconds = time.perf_counter() - started
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        return seconds

    async def _work(self, queue: Any) -> None:
        for text in queue:
            started = time.perf_counter()
            outcome = await self._outcome(text)
            self.latencies.append(time.perf_counter() - started)
            self.outcomes[text] = outcome

    async def _outcome(self, text: str) -> str:
        try:
            flagged = await self._check(text)
        except ModerationError as error:
            return type(error).__name__
        except Exception as error:  # noqa: BLE001 - whatever a contender raises is a result here
            return f"crash: {type(error).__name__}"
        return "verdict" if flagged == ("flagme" in text) else "wrong verdict"


def report(run: Run, seconds: float, sent: list[list[str]], kind: str) -> dict[str, Any]:
    """The figures; a verdict counts as unchecked if no usable answer ever named its text."""
    chosen = plan(1)
    usable = {text for index, texts in enumerate(sent) if chosen(index).kind in ("none", "drip") for text in texts}
    verdicts = [text for text, outcome in run.outcomes.items() if outcome == "verdict"]
    unchecked = 0 if kind == "ours-fallback" else sum(text not in usable for text in verdicts)
    waits = sorted(run.latencies)
    return {
        "contender": kind,
        "requests": len(run.texts),
        "seconds": round(seconds, 1),
        "outcomes": dict(Counter(run.outcomes.values())),
        "success_rate": round(len(verdicts) / len(run.texts), 4),
        "no_outcome_within_limit": len(run.texts) - len(run.outcomes),
        "verdicts_from_unusable_answers": unchecked,
        "latency_s": {f"p{q}": round(waits[int(q / 100 * (len(waits) - 1))], 3) for q in (50, 95, 99)},
        "http_requests": len(sent),
        "http_requests_per_call": round(len(sent) / max(1, len(run.outcomes)), 3),
    }


async def contend(kind: str, arguments: argparse.Namespace) -> dict[str, Any]:
    make = {"ours": ours, "sdk": sdk, "langchain": langchain}[kind.partition("-")[0]]
    with ServerProcess(plan, 1) as server:
        check, close = make(server.base_url, kind)
        run = Run(check, arguments.requests, arguments.concurrency)
        seconds = await run.go(arguments.limit)
        await close()
        return report(run, seconds, server.texts(), kind)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contenders", nargs="*", default=["ours", "ours-coalescing", "sdk", "sdk-timeout"])
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--limit", type=float, default=60.0)
    arguments = parser.parse_args()
    for kind in arguments.contenders:
        print(json.dumps(asyncio.run(contend(kind, arguments)), indent=2), flush=True)


if __name__ == "__main__":
    main()
