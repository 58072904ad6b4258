"""Decoding speed of the transformers engine beside model.generate, and how long it holds up an event loop.

    python benchmarks/engine_decode.py --dtype bfloat16 float32 --batch 1 8 16

Both are timed in turn and the best of ``--repeat`` runs counts. CPU seconds are those of the whole process; on a
machine with busy neighbours they say more than the clock. Prompts differ in length, as they do in service.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import Any

import anyio

from tta_middleware.engines.models import resolve_model
from tta_middleware.engines.torch_import import import_torch
from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.types import GenerationRequest, Message, PromptEmbeddings, Sampling

TEXT = "Write a long story about a lighthouse keeper who finds a letter in a bottle, and what it says."


class Stopwatch:
    """Best wall-clock and CPU seconds of several runs."""

    def __init__(self) -> None:
        self.wall = self.cpu = float("inf")

    def __enter__(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        wall, cpu = self._started
        self.wall = min(self.wall, time.perf_counter() - wall)
        self.cpu = min(self.cpu, time.process_time() - cpu)


async def ours(engine: TransformersEngine, prompts: list[PromptEmbeddings], tokens: int) -> None:
    await engine.generate_batch([GenerationRequest(prompt, Sampling(max_new_tokens=tokens)) for prompt in prompts])


def generate(plain: Any, prompts: list[PromptEmbeddings], tokens: int) -> None:
    import torch

    longest = max(len(prompt.token_ids) for prompt in prompts)
    ids = torch.full((len(prompts), longest), 2)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
        mask[row, longest - len(prompt.token_ids) :] = 1
    with torch.inference_mode():
        plain.generate(ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)


async def loop_lag(engine: TransformersEngine, prompts: list[PromptEmbeddings], tokens: int) -> float:
    """The longest time, in milliseconds, by which a 1 ms timer fired late while a batch decoded."""
    worst = 0.0

    async def watch() -> None:
        nonlocal worst
        while True:
            start = time.perf_counter()
            await asyncio.sleep(0.001)
            worst = max(worst, time.perf_counter() - start - 0.001)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch)
        await asyncio.sleep(0.01)
        await ours(engine, prompts, tokens)
        await engine.mean_nll(prompts[0], [prompts[0].token_ids.tolist()])
        tasks.cancel_scope.cancel()
    return worst * 1000


async def measure(dtype: str, batch: int, options: argparse.Namespace) -> str:
    from transformers import AutoModelForCausalLM

    engine = TransformersEngine(options.model, dtype=dtype)
    words = TEXT.split()
    texts = [" ".join(words[: len(words) - row % 4]) for row in range(batch)]
    prompts = [await engine.embed([Message("user", text)]) for text in texts]
    loaded: Any = engine._loaded
    loaded.eos_ids = frozenset()
    plain = AutoModelForCausalLM.from_pretrained(str(resolve_model(options.model)), dtype=loaded.dtype).eval()
    mine, theirs, first = Stopwatch(), Stopwatch(), Stopwatch()
    for _ in range(options.repeat + 1):
        with first:
            await ours(engine, prompts, 1)
        with mine:
            await ours(engine, prompts, options.tokens)
        with theirs:
            generate(plain, prompts, options.tokens)
    lag = await loop_lag(engine, prompts, options.tokens)
    await engine.aclose()
    count = batch * options.tokens
    return (
        f"{dtype:>9} batch {batch:>2}: ours {count / mine.wall:6.1f} tokens/s ({mine.cpu:.2f} CPU s), "
        f"generate {count / theirs.wall:6.1f} tokens/s ({theirs.cpu:.2f} CPU s), "
        f"first token {first.wall:.2f} s, worst loop lag {lag:.0f} ms"
    )


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", nargs="+", default=["auto"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 16])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    import_torch()
    for dtype in options.dtype:
        for batch in options.batch:
            print(await measure(dtype, batch, options), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
