"""Measures an engine raw and behind a guard, in one process and one run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import anyio

from tta_middleware.assembly import AnswerSettings, opened
from tta_middleware.batch.exit_codes import unwrapped
from tta_middleware.batch.standard import emit, note
from tta_middleware.cli.bench_load import Clock, Load, guarded, peak_memory, raw
from tta_middleware.cli.bench_prompts import harmless_prompts
from tta_middleware.cli.output import loaded
from tta_middleware.errors import ConfigurationError
from tta_middleware.evaluation.environment import environment
from tta_middleware.files.jsonl import Record
from tta_middleware.guard.guard import Guard
from tta_middleware.protocols import Engine, Moderator
from tta_middleware.types import Message, PromptEmbeddings, Sampling

WARM_UP = Sampling(max_new_tokens=4)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRequest:
    """What was asked for.

    Attributes:
        levels: how many sequences decode side by side in the raw part.
        chats: how many the guarded part answers, ``concurrency`` at a time.
        repeat: runs of each measurement; the fastest counts.
    """

    answering: AnswerSettings
    levels: tuple[int, ...]
    chats: int
    concurrency: int
    repeat: int


def parse_levels(text: str) -> tuple[int, ...]:
    """Numbers of sequences from what was typed.

    Raises:
        ConfigurationError: none, or one that is no whole number from 1.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isascii() and word.isdigit() and int(word) for word in words):
        raise ConfigurationError(f"--sequences takes whole numbers from 1 with commas between them, not {text!r}")
    return tuple(map(int, words))


def run_bench(request: BenchRequest, clock: Clock = time.perf_counter) -> None:
    """Measure and print one JSON object.

    Raises:
        EngineError: the model failed.
    """
    try:
        emit(anyio.run(_measured, request, clock))
    except BaseExceptionGroup as errors:
        raise unwrapped(errors) from None


async def _measured(request: BenchRequest, clock: Clock) -> Record:
    answering = request.answering
    texts = harmless_prompts(max(request.chats, *request.levels), answering.sampling.seed)
    chats = [[Message("user", text)] for text in texts]
    async with opened(answering, answering.moderator, loaded=loaded) as parts:
        engine, moderator = parts
        bench = _Bench(request, engine, chats, clock)
        prompts = [await engine.embed(chat) for chat in chats]
        await raw(engine, prompts[:2], WARM_UP, 2, clock)
        after_load = peak_memory()
        levels = [await bench.level(prompts[:count]) for count in request.levels]
        under_load = await bench.guarded(answering.guard_over(engine, moderator), prompts[: request.chats])
        return {
            **_description(request, engine, moderator),
            "raw": levels,
            **under_load,
            "peak_memory": {"after_load": after_load, "at_the_end": peak_memory()},
        }


def _description(request: BenchRequest, engine: Engine, moderator: Moderator) -> Record:
    answering = request.answering
    return {
        "model": engine.model_id,
        "device": answering.device,
        "dtype": answering.dtype,
        "max_batch": getattr(engine, "max_batch", None),
        "moderator": moderator.name,
        "method": answering.method,
        "max_new_tokens": answering.sampling.max_new_tokens,
        "temperature": answering.sampling.temperature,
        "seed": answering.sampling.seed,
        "repeat": request.repeat,
        "versions": environment(),
    }


@dataclass(frozen=True, slots=True)
class _Bench:
    request: BenchRequest
    engine: Engine
    chats: Sequence[Sequence[Message]]
    clock: Clock

    async def level(self, prompts: Sequence[PromptEmbeddings]) -> Record:
        """Raw speed with all of ``prompts`` side by side."""
        runs = [await self._raw(prompts, len(prompts)) for _ in range(self.request.repeat)]
        record = {"sequences": len(prompts), **_fastest(runs).as_record()}
        note(f"raw, {len(prompts)} sequences: {record['tokens_per_second']} tokens/s")
        return record

    async def guarded(self, guard: Guard, prompts: Sequence[PromptEmbeddings]) -> Record:
        """Raw and guarded speed of the same prompts at the same concurrency, in turn."""
        bare, checked = list[Load](), list[Load]()
        for _ in range(self.request.repeat):
            bare.append(await self._raw(prompts, self.request.concurrency))
            checked.append(await self._guarded(guard, len(prompts)))
        alone, behind = _fastest(bare), _fastest(checked)
        note(f"guarded, {len(prompts)} chats: {behind.rate:.1f} tokens/s against {alone.rate:.1f} raw")
        return {
            "chats": len(prompts),
            "concurrency": self.request.concurrency,
            "unguarded_chats": alone.as_record(),
            "guarded_chats": {**behind.as_record(), "outcomes": dict(behind.outcomes)},
            "guarded_against_unguarded": _ratios(behind, alone),
        }

    async def _raw(self, prompts: Sequence[PromptEmbeddings], concurrency: int) -> Load:
        return await raw(self.engine, prompts, self.request.answering.sampling, concurrency, self.clock)

    async def _guarded(self, guard: Guard, count: int) -> Load:
        sampling = self.request.answering.sampling
        return await guarded(guard, self.chats[:count], sampling, self.request.concurrency, self.clock)


def _ratios(load: Load, other: Load) -> Record:
    """Tokens per second of ``load`` over those of ``other``, by the clock and by processor time."""
    if not (other.tokens and other.seconds and other.cpu_seconds):
        return {"by_clock": None, "by_cpu": None}
    return {"by_clock": round(load.rate / other.rate, 3), "by_cpu": round(load.cpu_rate / other.cpu_rate, 3)}


def _fastest(runs: Sequence[Load]) -> Load:
    return max(runs, key=lambda load: load.rate)
