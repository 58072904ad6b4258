"""Puts an engine, alone or behind a guard, under load and takes the time."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TypeAlias

import anyio

from tta_middleware.files.jsonl import Record
from tta_middleware.guard.events import Finished, Released
from tta_middleware.guard.guard import Guard
from tta_middleware.protocols import Engine
from tta_middleware.types import GenerationRequest, Message, PromptEmbeddings, Sampling

Clock: TypeAlias = Callable[[], float]
One: TypeAlias = Callable[[int, "Load"], Awaitable[None]]


@dataclass(slots=True)
class Load:
    """What one run has shown.

    Attributes:
        cpu_seconds: of the whole process; with busy neighbours they say more than the clock.
        first: seconds of each sequence from when it was asked, waiting for a place in the batch included, to its first
            piece of text; ``first_by_outcome`` the same, by what became of a guarded one.
    """

    clock: Clock = time.perf_counter
    tokens: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    first_by_outcome: dict[str, list[float]] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.clock()
        self.cpu_seconds = -time.process_time()

    def stop(self) -> None:
        """The run is over."""
        self.seconds = self.clock() - self.started
        self.cpu_seconds += time.process_time()

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds if self.seconds else math.nan

    @property
    def cpu_rate(self) -> float:
        """Tokens a second of processor time."""
        return self.tokens / self.cpu_seconds if self.cpu_seconds else math.nan

    def as_record(self) -> Record:
        """Plain data."""
        return {
            "tokens": self.tokens,
            "seconds": round(self.seconds, 6),
            "cpu_seconds": round(self.cpu_seconds, 6),
            "tokens_per_second": round(self.rate, 1),
            "first_token_seconds": quantiles(self.first),
        }


async def raw(
    engine: Engine, prompts: Sequence[PromptEmbeddings], sampling: Sampling, concurrency: int, clock: Clock
) -> Load:
    """Stream every prompt's answer from the engine itself, ``concurrency`` at a time."""

    async def one(index: int, load: Load) -> None:
        asked, waited = clock(), None
        async with aclosing(engine.stream(GenerationRequest(prompts[index], sampling))) as deltas:
            async for delta in deltas:
                load.tokens += len(delta.token_ids)
                if delta.text and waited is None:
                    waited = clock() - asked
                    load.first.append(waited)

    return await _loaded(one, len(prompts), concurrency, clock)


async def guarded(
    guard: Guard, chats: Sequence[Sequence[Message]], sampling: Sampling, concurrency: int, clock: Clock
) -> Load:
    """Stream every chat's answer through the guard; the tokens are all that the engine decoded for it."""

    async def one(index: int, load: Load) -> None:
        asked, waited = clock(), None
        async with aclosing(guard.stream(chats[index], sampling)) as events:
            async for event in events:
                if isinstance(event, Released) and waited is None:
                    waited = clock() - asked
                    load.first.append(waited)
                if isinstance(event, Finished):
                    trace = event.answer.trace
                    load.tokens += trace.generated_tokens
                    load.outcomes[trace.outcome] += 1
                    if waited is not None:
                        load.first_by_outcome.setdefault(trace.outcome, []).append(waited)

    return await _loaded(one, len(chats), concurrency, clock)


def peak_memory() -> Record:
    """Most memory that this process has held so far, in MiB: resident, and allocated on CUDA where that is in use."""
    found: Record = {}
    if sys.platform != "win32":
        import resource

        unit = 2**20 if sys.platform == "darwin" else 2**10
        found["resident_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        found["cuda_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
    return found


async def _loaded(one: One, count: int, concurrency: int, clock: Clock) -> Load:
    load, indices = Load(clock), iter(range(count))

    async def work() -> None:
        for index in indices:
            await one(index, load)

    async with anyio.create_task_group() as workers:
        for _ in range(concurrency):
            workers.start_soon(work)
    load.stop()
    return load


def quantiles(values: Sequence[float]) -> Record:
    """The median and the 95th percentile; None of no values."""
    return {"p50": _quantile(values, 0.5), "p95": _quantile(values, 0.95)}


def _quantile(values: Sequence[float], share: float) -> float | None:
    """By nearest rank; None without values."""
    if not values:
        return None
    return round(statistics.median(values) if share == 0.5 else sorted(values)[math.ceil(share * len(values)) - 1], 6)
