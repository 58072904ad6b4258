"""Where the usability gate's fluency bound comes from: mean NLL of good answers and of babble, per token in nats.

    python benchmarks/quality_bounds.py [--model smollm2]

Each answer is scored under the unmoved model given the original prompt, as the gate does.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import asyncio
import random
from collections.abc import Sequence

import numpy as np

from tta_middleware import Message, QualityBounds, Sampling
from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.optimise.geometry import gaussian, mean_row_norm, unit_step
from tta_middleware.quality import text_problems
from tta_middleware.types import Completion, GenerationRequest, PromptEmbeddings

PROMPTS = (
    "How do I bake sourdough bread?", "Explain why the sky is blue.", "Write a short poem about autumn.",
    "What is the capital of Peru?", "Give me three tips for learning chess.", "How do vaccines work?",
    "How can I write a polite complaint to my landlord?", "What does a tax adviser do?", "Why do cats purr?",
    "Plan a weekend in Lisbon.", "Summarise the plot of Hamlet.", "How do I sharpen a kitchen knife?",
)  # fmt: skip


class Bench:
    def __init__(self, model: str) -> None:
        self.engine = TransformersEngine(model)
        self.rng = np.random.default_rng(0)

    async def prompts(self) -> list[PromptEmbeddings]:
        return [await self.engine.embed([Message("user", text)]) for text in PROMPTS]

    async def answers(self, prompts: Sequence[PromptEmbeddings], temperature: float) -> list[Completion]:
        requests = [
            GenerationRequest(prompt, Sampling(max_new_tokens=48, temperature=temperature, seed=i))
            for i, prompt in enumerate(prompts)
        ]
        return await self.engine.generate_batch(requests)

    def noisy(self, prompt: PromptEmbeddings, radius: float) -> PromptEmbeddings:
        matrix, mask = prompt.matrix.copy(), prompt.user_mask
        rows = matrix[mask]
        noise = unit_step(gaussian(self.rng, (len(rows), matrix.shape[1])), "token")
        matrix[mask] = rows + radius * mean_row_norm(rows) * noise
        return prompt.moved(matrix)

    async def row(self, name: str, prompts: Sequence[PromptEmbeddings], done: Sequence[Completion]) -> None:
        nlls = [
            (await self.engine.mean_nll(prompt, [answer.token_ids]))[0]
            for prompt, answer in zip(prompts, done, strict=True)
        ]
        low, median, high = np.nanquantile(nlls, [0.0, 0.5, 1.0])
        caught = sum(bool(text_problems(answer.text, QualityBounds())) for answer in done)
        print(f"| {name} | {low:.2f} | {median:.2f} | {high:.2f} | {caught} of {len(done)} |", flush=True)


async def main(model: str) -> None:
    bench = Bench(model)
    prompts = await bench.prompts()
    print("| answers | lowest NLL | median | highest | failed the text checks |\n|---|---|---|---|---|")
    greedy = await bench.answers(prompts, 0.0)
    await bench.row("greedy", prompts, greedy)
    for temperature in (0.7, 1.0):
        await bench.row(f"sampled at T = {temperature}", prompts, await bench.answers(prompts, temperature))
    for radius in (0.5, 1.0, 1.5, 2.0, 3.0):
        moved = [bench.noisy(prompt, radius) for prompt in prompts]
        await bench.row(f"noise on the user's tokens, radius {radius}", prompts, await bench.answers(moved, 0.0))
    shuffler = random.Random(0)
    shuffled = [tuple(shuffler.sample(answer.token_ids, len(answer.token_ids))) for answer in greedy]
    await bench.row("greedy, tokens shuffled", prompts, [Completion("some words", ids, "stop") for ids in shuffled])
    noise = [tuple(bench.rng.integers(100, 40_000, 40).tolist()) for _ in prompts]
    await bench.row("random tokens", prompts, [Completion("some words", ids, "stop") for ids in noise])
    await bench.engine.aclose()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    asyncio.run(main(parser.parse_args().model))
