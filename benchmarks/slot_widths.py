"""Decode steps of short sequences, with and without a long one among them: processor time, and memory for keys.

    python benchmarks/slot_widths.py

``--short`` sequences of some 40 tokens decode side by side, first by themselves, then with one whose prompt has
``--long`` tokens. Counted are ``--steps`` steps in which all of them decode and nothing else runs: processor time of
this process per step, tokens per second of it, and the bytes of the buffers for keys and values.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import anyio

from tta_middleware import Message, Sampling
from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.types import GenerationRequest, PromptEmbeddings

TEXT = "Write a long story about a lighthouse keeper who finds a letter in a bottle. "


async def prompt_of(engine: TransformersEngine, tokens: int) -> PromptEmbeddings:
    """A prompt of about so many tokens."""
    each = len(await engine.token_ids(TEXT))
    return await engine.embed([Message("user", TEXT * max(1, tokens // each))])


async def measured(engine: TransformersEngine, prompts: list[PromptEmbeddings], steps: int) -> dict[str, Any]:
    """Per step: processor time, and what the buffers take; of steps in which all prompts decode."""
    found: dict[str, Any] = {}
    most = Sampling(max_new_tokens=4 * steps + 2 * len(prompts))
    begun = 0

    async def read(index: int, scope: anyio.CancelScope) -> None:
        nonlocal begun
        first = True
        async for _ in engine.stream(GenerationRequest(prompts[index], most)):
            begun, first = begun + first, False
            if index or begun < len(prompts):
                continue
            # All have their first token; from here on each token of this one is a step of all.
            count = found.setdefault("count", -2) + 1
            found["count"] = count
            if count == 0:
                found["start"] = time.process_time()
            if count == steps:
                found["cpu"] = (time.process_time() - found["start"]) / steps
                found["bytes"] = engine._decoder._batch._slots.nbytes
                scope.cancel()
                return

    async with anyio.create_task_group() as tasks:
        for index in range(len(prompts)):
            tasks.start_soon(read, index, tasks.cancel_scope)
    return found


async def measure(options: argparse.Namespace) -> None:
    engine = TransformersEngine(
        options.model, dtype=options.dtype, max_batch=options.short + 1, cache_gib=options.cache_gib
    )
    short = await prompt_of(engine, 40)
    long = await prompt_of(engine, options.long)
    print(
        "| sequences | longest prompt | CPU s a step | tokens per CPU second | buffers (MiB) |\n|---|---|---|---|---|"
    )
    for prompts in ([short] * options.short, [long, *[short] * options.short]):
        found = await measured(engine, prompts, options.steps)
        cells = [len(prompts), len(prompts[0].matrix), f"{found['cpu']:.3f}", f"{len(prompts) / found['cpu']:.0f}"]
        print(f"| {' | '.join(map(str, cells))} | {found['bytes'] / 2**20:.0f} |", flush=True)
    await engine.aclose()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--short", type=int, default=16)
    parser.add_argument("--long", type=int, default=4000)
    parser.add_argument("--cache-gib", type=float, default=None)
    parser.add_argument("--steps", type=int, default=16)
    anyio.run(measure, parser.parse_args())


if __name__ == "__main__":
    main()
