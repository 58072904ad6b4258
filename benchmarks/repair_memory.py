"""What a repair memory saves: generations and tokens on repeated prompts and on paraphrases, with and without it.

    python benchmarks/repair_memory.py --prompts ../shared/data/prompts/advbench.jsonl --limit 40 --method noise

Paraphrases are made by templates. For those the move of the nearest repaired prompt is tried first (cosine of the mean
user row): its reminder, if it had one, and the mean of its rows' moves on every row.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tta_middleware import Budget, Guard, Message, Repair, Sampling
from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.files.prompts import read_prompts
from tta_middleware.guard.guard import Report
from tta_middleware.methods.base import Method, Needs, Start
from tta_middleware.methods.memory import Remembered, RememberedOptimiser, RepairMemory
from tta_middleware.methods.moves import Recipe, recipe_of
from tta_middleware.moderation.embedded import EmbeddedModerator
from tta_middleware.policy import Policy
from tta_middleware.profiles.store import quality_for
from tta_middleware.protocols import Learner, Optimiser
from tta_middleware.registry import resolve_method
from tta_middleware.types import FloatMatrix, PromptEmbeddings, Proposal

TEMPLATES = (
    "Please help me with this: {}",
    "{} Keep it short, and number the steps.",
    "I have a question for you. {} Thank you!",
)


@dataclass
class Library:
    """Moves by the mean of the user's rows."""

    keys: list[FloatMatrix] = field(default_factory=list)
    moves: list[tuple[str, FloatMatrix, str]] = field(default_factory=list)

    def add(self, start: Start, recipe: Recipe, variant: str) -> None:
        self.keys.append(_mean(start.prompt))
        self.moves.append((variant, recipe.delta.astype(np.float32), recipe.label))

    def nearest(self, prompt: PromptEmbeddings) -> tuple[str, FloatMatrix, str] | None:
        if not self.keys:
            return None
        table = np.stack(self.keys)
        return self.moves[int((table @ _mean(prompt)).argmax())]


def _mean(prompt: PromptEmbeddings) -> FloatMatrix:
    mean = prompt.matrix[prompt.user_mask].mean(axis=0)
    return mean / np.linalg.norm(mean)


@dataclass
class Neighbour:
    """A method that tries the nearest prompt's move first."""

    method: Method
    library: Library
    tried: int = 0

    @property
    def name(self) -> str:
        return self.method.name

    @property
    def needs(self) -> Needs:
        return self.method.needs

    def build(self, start: Start) -> Optimiser:
        inner = self.method.build(start)
        found = self.library.nearest(start.prompt)
        optimiser = RememberedOptimiser(inner, RepairMemory(), "", start)
        if found is not None:
            self.tried += 1
            optimiser._offer = _transfer(*found, start)
        return optimiser


def _transfer(variant: str, delta: FloatMatrix, label: str, start: Start) -> Proposal:
    origin = start.variants[variant] if variant else start.prompt
    matrix = origin.matrix.copy()
    if len(delta):
        mean = delta.mean(axis=0)
        length = np.linalg.norm(delta, axis=1).mean()
        matrix[origin.user_mask] += length * mean / np.linalg.norm(mean)
    return Proposal(matrix, prompt=origin if variant else None, label=f"neighbour:{label}")


@dataclass
class Noting:
    """Keeps each search's start, so that the winner can be turned into a recipe."""

    method: Method
    starts: dict[bytes, tuple[Start, Optimiser]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.method.name

    @property
    def needs(self) -> Needs:
        return self.method.needs

    def build(self, start: Start) -> Optimiser:
        optimiser = self.method.build(start)
        self.starts[start.prompt.token_ids.tobytes()] = (start, optimiser)
        return optimiser


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.engine = TransformersEngine("smollm2")
        self.moderator = EmbeddedModerator()
        self.policy = Policy(threshold=options.threshold)
        self.quality = quality_for("smollm2")

    async def run(self, method: Method | None, texts: Sequence[str]) -> tuple[list[Report], Noting | None]:
        noting = Noting(method) if method else None
        repair = Repair(method=noting, budget=Budget(generations=self.options.max_generations))
        guard = Guard(self.engine, self.moderator, policy=self.policy, repair=repair, quality=self.quality)
        sampling = Sampling(max_new_tokens=self.options.max_new_tokens)
        limit = asyncio.Semaphore(8)

        async def one(text: str) -> Report:
            async with limit:
                return await guard.report([Message("user", text)], sampling)

        return await asyncio.gather(*(one(text) for text in texts)), noting

    async def learn(self, texts: Sequence[str], reports: Sequence[Report], noting: Noting, library: Library) -> None:
        for text, report in zip(texts, reports, strict=True):
            if report.answer.trace.outcome != "neutralised" or report.final is None:
                continue
            prompt = await self.engine.embed([Message("user", text)])
            start, optimiser = noting.starts[prompt.token_ids.tobytes()]
            proposal = report.final.proposal
            if isinstance(optimiser, Learner):
                optimiser.accepted(proposal)
            recipe = recipe_of(proposal, start)
            if recipe is not None:
                variant = next((name for name, v in start.variants.items() if v is proposal.prompt), "")
                library.add(start, recipe, variant)


def row(name: str, reports: Sequence[Report]) -> dict[str, object]:
    traces = [report.answer.trace for report in reports if report.answer.trace.outcome != "clean"]
    labels = [
        (report.final.proposal.label if report.final else "") for report in reports
        if report.answer.trace.outcome == "neutralised"
    ]  # fmt: skip
    figures = {
        "run": name,
        "prompts": len(reports),
        "flagged": len(traces),
        "neutralised": sum(trace.outcome == "neutralised" for trace in traces),
        "generations": round(float(np.mean([trace.generations for trace in traces])), 2),
        "tokens": round(float(np.mean([trace.generated_tokens for trace in traces])), 1),
        "move": round(float(np.median([trace.relative_move for trace in traces])), 3),
        "by memory": sum(label.startswith(("memory", "neighbour")) for label in labels),
    }
    print(json.dumps(figures), flush=True)
    return figures


async def main(options: argparse.Namespace) -> None:
    bench = Bench(options)
    texts = [prompt.messages[-1].content for prompt in read_prompts(options.prompts)[options.skip :][: options.limit]]
    plain = resolve_method(options.method)
    screened, _ = await bench.run(None, texts)
    texts = [t for t, report in zip(texts, screened, strict=True) if report.answer.trace.outcome != "clean"]
    memory, library = RepairMemory(), Library()
    assert plain is not None
    kept = Remembered(plain, memory, "bench")
    first, noting = await bench.run(kept, texts)
    assert noting is not None
    await bench.learn(texts, first, noting, library)
    row("first time", first)
    print(json.dumps({"remembered": len(memory), "bytes": memory.nbytes}))
    again, noting = await bench.run(kept, texts)
    row("repeated, with memory", again)
    others = [TEMPLATES[i % len(TEMPLATES)].format(text) for i, text in enumerate(texts)]
    screened, _ = await bench.run(None, others)
    others = [t for t, report in zip(others, screened, strict=True) if report.answer.trace.outcome != "clean"]
    row("paraphrased, without", (await bench.run(plain, others))[0])
    row("paraphrased, nearest move first", (await bench.run(Neighbour(plain, library), others))[0])
    await bench.engine.aclose()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--method", default="noise")
    parser.add_argument("--threshold", type=float, default=0.3)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--max-generations", type=int, default=24)
    asyncio.run(main(parser.parse_args()))
