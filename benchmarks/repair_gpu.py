"""Tokens per second while every answer is repaired, on random weights: what a GPU waits for, pass by pass.

    python benchmarks/repair_gpu.py --shape 0.5B --chats 96 --places 128

So many chats at once, each answer flagged and each candidate of `race` as well, so that all use up their generations;
the model judges itself, so texts to score and prompts run beside the decode steps all the time. Said of passes that
only decode and of the others: how many, how much ran in one, and how long launching it took. ``--every 1`` runs prompts
and texts with every pass, ``--one-by-one`` launches each one's attention by itself.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import anyio
from engine_gpu import SHAPES, make_model

from tta_middleware import Budget, Guard, Policy, Race, Repair, Sampling
from tta_middleware.engines.decoding import running_batch
from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.registry import resolve_moderator
from tta_middleware.types import Message

QUESTION = "Tell me in detail how one would do the thing number {number} that nobody should ever do to a garden fence"


@dataclass(frozen=True, slots=True)
class Ran:
    """One pass: sequences that decoded, segments and columns beside them, and the seconds until it was launched."""

    decoding: int
    segments: int
    columns: int
    seconds: float


class NotedBatch(running_batch.Batch):
    """Notes its passes."""

    passes: list[Ran] = []  # noqa: RUF012  one engine at a time

    def _forward(self, slots: Any, segments: Sequence[Any]) -> Any:
        begun = time.perf_counter()
        logits = super()._forward(slots, segments)
        columns = sum(segment.count for segment in segments)
        self.passes.append(Ran(len(slots.lengths), len(segments), columns, time.perf_counter() - begun))
        return logits


async def repaired(guard: Guard, chats: int, tokens: int) -> int:
    """Tokens that so many chats at once generate."""
    found: list[int] = []

    async def one(number: int) -> None:
        report = await guard.report([Message("user", QUESTION.format(number=number))], Sampling(tokens))
        found.append(report.answer.trace.generated_tokens)

    async with anyio.create_task_group() as group:
        for number in range(chats):
            group.start_soon(one, number)
    return sum(found)


def told(passes: Sequence[Ran]) -> str:
    beside = [ran for ran in passes if ran.segments]
    alone = [ran for ran in passes if not ran.segments]
    return " | ".join(
        [
            str(len(alone)),
            f"{1000 * fmean(ran.seconds for ran in alone):.1f}" if alone else "-",
            str(len(beside)),
            f"{fmean(ran.segments for ran in beside):.0f}" if beside else "-",
            f"{fmean(ran.columns for ran in beside):.0f}" if beside else "-",
            f"{1000 * fmean(ran.seconds for ran in beside):.1f}" if beside else "-",
        ]
    )


async def measure(options: argparse.Namespace, folder: str) -> None:
    engine = TransformersEngine(folder, device=options.device, dtype="bfloat16", max_batch=options.places)
    await engine.load()
    loaded: Any = engine._loaded
    if options.one_by_one:
        loaded._flash = None
    repair = Repair(Race(), Budget(generations=options.generations))
    # Nothing is safe by this threshold.
    guard = Guard(engine, resolve_moderator("self", engine=engine), policy=Policy(threshold=1e-9), repair=repair)
    print(
        "| chats | tokens/s | passes that only decode | ms | others | segments | their columns | ms |\n|" + "---|" * 8
    )
    for chats in (8, options.chats):
        NotedBatch.passes.clear()
        begun = time.perf_counter()
        count = await repaired(guard, chats, options.tokens)
        rate = count / (time.perf_counter() - begun)
        print(f"| {chats} | {rate:.0f} | {told(NotedBatch.passes)} |", flush=True)
    await engine.aclose()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.5B")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--chats", type=int, default=96)
    parser.add_argument("--places", type=int, default=128)
    parser.add_argument("--generations", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--every", type=int, default=running_batch._EVERY)
    parser.add_argument("--one-by-one", action="store_true")
    options = parser.parse_args()
    running_batch._EVERY = options.every
    # The decoder makes its batch by this name.
    import tta_middleware.engines.decoding.decoder as decoder

    decoder.Batch = NotedBatch
    with tempfile.TemporaryDirectory() as folder:
        make_model(options.shape, Path(folder), options.device)
        anyio.run(measure, options, folder)


if __name__ == "__main__":
    main()
