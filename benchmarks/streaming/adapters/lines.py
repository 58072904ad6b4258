"""What the adapters share: a JSON job a line comes in, JSON lines of text and time go out. Standard library only.

A job is ``{"kind": ..., "question": ..., "base_url": ...}``. Each piece of text that the consumer receives gives a
line ``{"text": ..., "at": seconds since the request}``, the end ``{"done": seconds, "error": ..., "state": ...}``.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

Kind = Callable[[dict[str, Any]], AsyncIterator[str]]
"""A stream for a job; it may put what stays in the conversation's state under ``state`` into the job."""


def main(kinds: dict[str, Kind]) -> None:
    """Serve jobs until the input ends. What libraries print goes to standard error."""
    out, sys.stdout = sys.stdout, sys.stderr
    asyncio.run(_serve(kinds, out))


async def _serve(kinds: dict[str, Kind], out: Any) -> None:
    while line := await asyncio.to_thread(sys.stdin.readline):
        for event in await _run(kinds, json.loads(line)):
            print(json.dumps(event), file=out)
        out.flush()


async def _run(kinds: dict[str, Kind], job: dict[str, Any]) -> list[dict[str, Any]]:
    """Nothing is written before the end, so that writing costs no time of the stream."""
    events: list[dict[str, Any]] = []
    error = None
    started = time.perf_counter()
    try:
        async for text in kinds[job["kind"]](job):
            if text:
                events.append({"text": text, "at": time.perf_counter() - started})
    except Exception as problem:  # noqa: BLE001 - whatever a system raises at its consumer is a result here
        error = f"{type(problem).__name__}: {problem}"[:300]
    return [*events, {"done": time.perf_counter() - started, "error": error, "state": job.get("state")}]
