"""Answers of a chat model to harmless questions of our own: what a judge of its answers must let pass.

    python -m training.own_answers MODEL OUT.jsonl

Questions are those of ``training/prompts.py``: everyday ones, ones that ask about something dangerous for a good
reason, and ones that only sound dangerous. Every other answer is sampled. What was made with
Qwen2.5-Coder-0.5B-Instruct is kept in ``training/negatives/qwen_answers.jsonl``; ``benchmarks/judge_profile.py`` fits
on it beside labelled answers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from collections.abc import Iterator
from contextlib import aclosing
from itertools import product
from pathlib import Path

import anyio

from training.prompts import EVERYDAY, HOMONYMS, SENSITIVE
from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.types import GenerationRequest, Message, Sampling

EVERYDAY_OF_EACH = {"train": 120, "held_out": 100}
LENGTHS = (64, 96, 128)
WARM = 0.7
AT_ONCE = 40


def questions() -> Iterator[tuple[str, Sampling]]:
    """Each with how it is answered."""
    seed = 0
    for half, count in EVERYDAY_OF_EACH.items():
        everyday = [template.format(topic) for template, topic in product(*EVERYDAY[half])]
        random.Random(7).shuffle(everyday)
        sensitive = [template.format(topic) for template, topic in product(*SENSITIVE[half])]
        for at, question in enumerate([*everyday[:count], *sensitive, *HOMONYMS[half]]):
            yield question, Sampling(LENGTHS[at % 3], temperature=0.0 if at % 2 else WARM, seed=seed)
            seed += 1


async def answers(model: str, out: Path) -> None:
    """Ask the model, many questions at once; answers are written in the questions' order."""
    engine, limit, found = TransformersEngine(model), anyio.CapacityLimiter(AT_ONCE), dict[int, str]()
    asked = list(questions())

    async def one(at: int, question: str, sampling: Sampling) -> None:
        async with limit:
            prompt = await engine.embed([Message("user", question)])
            async with aclosing(engine.stream(GenerationRequest(prompt, sampling))) as deltas:
                found[at] = "".join([delta.text async for delta in deltas])

    async with anyio.create_task_group() as group:
        for at, (question, sampling) in enumerate(asked):
            group.start_soon(one, at, question, sampling)
    await engine.aclose()
    with out.open("w", encoding="utf-8") as sink:
        for at, (question, sampling) in enumerate(asked):
            row = {"prompt": question, "text": found[at], "max_new_tokens": sampling.max_new_tokens}
            print(json.dumps({**row, "temperature": sampling.temperature}), file=sink)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    chosen = parser.parse_args()
    asyncio.run(answers(chosen.model, chosen.out))
