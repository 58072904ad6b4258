"""Does a search in a space of few directions beat a random step of the same size and cost?

    python -m pip install cmaes
    python benchmarks/search_ideas.py PROMPTS.jsonl --out RESULTS.jsonl [--model MODEL] [--limit N] [--seeds 0,1]

Every idea moves the user's rows by the same share of their norms, along a mix of eight words' directions in the model's
own table; they differ in how the mix is chosen. One answer at a time, greedy, no reminder, the same first answers and
the same budget. ``isotropic`` is a random direction for each row instead of a mix of words. ``halving`` has four random
mixes answer for a quarter of the tokens, goes on with the two that score best up to a half, and with the better one to
the end (Jamieson and Talwalkar 2016, arXiv 1502.07943). ``random`` is the control that an idea has to beat: a random
mix, asked as often. What is counted is generations and tokens until an answer is
safe and usable, so a busy machine changes nothing. A run that was cut off goes on from RESULTS.jsonl.

The table gives each idea's mean difference to ``random`` over the same prompts and seeds, with a 95% interval
(bootstrap over prompts, scipy). ``--sum-up`` prints it from RESULTS.jsonl alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from race_ablation import RACE, Bench, Flagged, side_by_side
from scipy.stats import bootstrap

from tta_middleware import Budget, Guard, Policy, Repair, Sampling
from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.files.prompts import read_prompts
from tta_middleware.guard.context import last_user_text
from tta_middleware.guard.quality import QualityGate
from tta_middleware.methods.base import Method, Needs, OpenProposals, Start
from tta_middleware.methods.geometry import gaussian, unit_step
from tta_middleware.profiles.store import judge_calibration
from tta_middleware.registry import resolve_moderator
from tta_middleware.types import Completion, FloatMatrix, GenerationRequest, PromptEmbeddings, Proposal

WORDS = ("protect", "safe", "ethical", "help", "law", "care", "prevent", "alternative")
RADIUS = 0.5
Mix = NDArray[np.float64]
"""(8,) coefficients of the words; only their direction counts, the length of a step is fixed."""


class Chooser:
    """Which mix comes next, given the losses of those before. The base is the control: a random one."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.seen: list[tuple[Mix, float]] = []

    def ask(self) -> Mix:
        return self.rng.standard_normal(len(WORDS))

    def tell(self, mix: Mix, loss: float) -> None:
        self.seen.append((mix, loss))

    @property
    def best(self) -> Mix:
        return min(self.seen, key=lambda pair: pair[1])[0]


class Coordinates(Chooser):
    """One word after the other is added to the best mix, and taken from it; what lowers the loss stays."""

    def ask(self) -> Mix:
        turn = len(self.seen)
        word = np.zeros(len(WORDS))
        word[turn // 2 % len(WORDS)] = 1.0 if turn % 2 == 0 else -1.0
        return word if turn < 2 else self.best / np.linalg.norm(self.best) + word


class Evolution(Chooser):
    """CMA-ES (Hansen 2016, arXiv 1604.00772): ranks, populations of four."""

    def __init__(self, rng: np.random.Generator) -> None:
        super().__init__(rng)
        from cmaes import CMA

        size = len(WORDS)
        self.optimiser = CMA(
            mean=np.full(size, size**-0.5), sigma=0.5, population_size=4, seed=int(rng.integers(2**31))
        )
        self.told: list[tuple[Mix, float]] = []

    def ask(self) -> Mix:
        return np.asarray(self.optimiser.ask())

    def tell(self, mix: Mix, loss: float) -> None:
        super().tell(mix, loss)
        self.told.append((mix, loss))
        if len(self.told) == self.optimiser.population_size:
            self.optimiser.tell(self.told)
            self.told = []


class Contrast(Chooser):
    """After four random mixes: the mean of the better half less the mean of the worse, with some noise."""

    def ask(self) -> Mix:
        if len(self.seen) < 4:
            return super().ask()
        order = sorted(self.seen, key=lambda pair: pair[1])
        half = len(order) // 2
        units = [mix / np.linalg.norm(mix) for mix, _ in order]
        towards = np.mean(units[:half], axis=0) - np.mean(units[half:], axis=0)
        return towards / np.linalg.norm(towards) + 0.3 * super().ask()


class Gradient(Chooser):
    """The paper's forward differences in the space of the words: four probes, one normalised step, and so on."""

    PROBES, MU, ETA = 4, 0.5, 1.0

    def __init__(self, rng: np.random.Generator) -> None:
        super().__init__(rng)
        self.point = np.full(len(WORDS), len(WORDS) ** -0.5)
        self.base = 0.0
        self.probes: list[tuple[Mix, float]] = []
        self.turn = 0

    def ask(self) -> Mix:
        if self.turn == 0:
            return self.point
        self.noise = super().ask()
        return self.point + self.MU * self.noise

    def tell(self, mix: Mix, loss: float) -> None:
        super().tell(mix, loss)
        if self.turn == 0:
            self.base = loss
        else:
            self.probes.append((self.noise, loss))
        self.turn += 1
        if self.turn > self.PROBES:
            slope = np.mean([(loss - self.base) / self.MU * noise for noise, loss in self.probes], axis=0)
            size = np.linalg.norm(slope)
            self.point = self.point - self.ETA * slope / size if size else super().ask()
            self.turn, self.probes = 0, []


class Mean(Chooser):
    """All words alike first, as ``race`` steps; random mixes afterwards."""

    def ask(self) -> Mix:
        return super().ask() if self.seen else np.ones(len(WORDS))


class Near(Chooser):
    """Where ``evolution`` draws its first four from, and stays there: the mean of the words and some noise."""

    def ask(self) -> Mix:
        return np.full(len(WORDS), len(WORDS) ** -0.5) + 0.5 * super().ask()


class Warm(Chooser):
    """What repaired earlier prompts comes first, the most successful before the others; random mixes afterwards."""

    pool: ClassVar[dict[bytes, int]] = {}
    """The mixes that won, and how often; shared by all searches of a run, which are not side by side then."""

    def __init__(self, rng: np.random.Generator) -> None:
        super().__init__(rng)
        self.first = sorted(self.pool, key=lambda key: -self.pool[key])[:3]

    def ask(self) -> Mix:
        turn = len(self.seen)
        return np.frombuffer(self.first[turn]) if turn < len(self.first) else super().ask()

    @classmethod
    def won(cls, mix: Mix) -> None:
        key = np.asarray(mix, dtype=np.float64).tobytes()
        cls.pool[key] = cls.pool.get(key, 0) + 1


IDEAS: Mapping[str, type[Chooser] | None] = {
    "random": Chooser,
    "isotropic": None,
    "mean of the words": Mean,
    "near the mean": Near,
    "coordinates": Coordinates,
    "evolution": Evolution,
    "contrast": Contrast,
    "gradient": Gradient,
    "warm start": Warm,
}
NAMES = (*IDEAS, "halving", "race")


def along(mix: Mix, table: FloatMatrix) -> NDArray[np.float32]:
    """(d,) the direction of a mix, of length 1."""
    towards = mix @ table
    return np.asarray(towards / np.linalg.norm(towards), dtype=np.float32)


def moved(prompt: PromptEmbeddings, direction: NDArray[np.float32]) -> FloatMatrix:
    """The prompt's rows with the user's moved by :data:`RADIUS` of their norms; ``direction`` (d,) or (rows, d)."""
    matrix, mask = prompt.matrix.copy(), prompt.user_mask
    rows = matrix[mask]
    matrix[mask] = rows + RADIUS * np.linalg.norm(rows, axis=1, keepdims=True) * direction
    return matrix


class Halving:
    """Successive halving of random mixes, until an answer is safe and usable or no answer is left to ask for.

    An answer that goes on is decoded anew, greedily, and counts as if it had gone on: by its new tokens alone.
    """

    SIDES, SHARES = 4, (0.25, 0.5, 1.0)

    def __init__(self, bench: Ideas, item: Flagged, seed: int) -> None:
        self._bench, self._item = bench, item
        self._rng = np.random.default_rng([seed, *str(item.prompt.id).encode()])
        self.won, self.loss, self.tokens, self.answers = False, float("inf"), 0, 0

    async def run(self) -> None:
        engine = self._item.engine
        prompt = await engine.embed(self._item.prompt.messages)
        table = await engine.directions(WORDS)
        while not self.won and self.answers + self.SIDES < self._bench.budget.generations:
            mixes = self._rng.standard_normal((self.SIDES, len(WORDS)))
            self.answers += self.SIDES
            await self._round(prompt, [replace(prompt, matrix=moved(prompt, along(mix, table))) for mix in mixes])

    async def _round(self, prompt: PromptEmbeddings, sides: list[PromptEmbeddings]) -> None:
        lengths, done = [0] * len(sides), list[Completion]()
        for share in self.SHARES:
            sampling = replace(self._bench.sampling, max_new_tokens=round(share * self._bench.sampling.max_new_tokens))
            done = await self._item.engine.generate_batch([GenerationRequest(side, sampling) for side in sides])
            self.tokens += sum(max(0, len(one.token_ids) - before) for one, before in zip(done, lengths, strict=True))
            question = last_user_text(self._item.prompt.messages)
            verdicts = await self._bench.moderator.moderate([one.text for one in done], prompt=question)
            losses = [self._bench.policy.decide(verdict).excess for verdict in verdicts]
            kept = np.argsort(losses, kind="stable")[: max(1, len(sides) // 2)]
            sides, done = [sides[at] for at in kept], [done[at] for at in kept]
            lengths, self.loss = [len(one.token_ids) for one in done], losses[kept[0]]
        safe = self.loss < 0.0
        self.won = safe and (await QualityGate().assess(self._item.engine, prompt, done))[0].usable


@dataclass
class Idea:
    """A method that walks by one chooser, or by random rows."""

    name: str
    chooser: type[Chooser] | None
    asked: list[Mix] = field(default_factory=list)
    needs: ClassVar[Needs] = Needs(words=WORDS, margin=False)

    def build(self, start: Start) -> Walk:
        return Walk(self, start)


class Walk:
    """An optimiser: one proposal at a time, until the budget ends."""

    def __init__(self, idea: Idea, start: Start) -> None:
        self.name, self._idea, self._start = idea.name, idea, start
        self._chooser = idea.chooser(start.rng) if idea.chooser else None
        self._table = np.stack([start.directions[word] for word in WORDS])
        self._open = OpenProposals()
        self._mix: Mix = np.zeros(len(WORDS))

    def ask(self, limit: int) -> list[Proposal]:
        if limit < 1 or self.stop() or len(self._open):
            return []
        prompt = self._start.prompt
        matrix = moved(prompt, self._direction((int(prompt.user_mask.sum()), prompt.matrix.shape[1])))
        return [self._open.add(Proposal(matrix, label=self.name), 0)]

    def _direction(self, shape: tuple[int, int]) -> NDArray[np.float32]:
        if self._chooser is None:
            return unit_step(gaussian(self._start.rng, shape), "token")
        self._mix = self._chooser.ask()
        self._idea.asked.append(self._mix)
        return along(self._mix, self._table)

    def tell(self, proposals: Sequence[Proposal], losses: Sequence[float]) -> None:
        for _, loss in self._open.resolve(proposals, losses):
            if self._chooser is not None:
                self._chooser.tell(self._mix, loss)

    def stop(self) -> tuple[str, ...]:
        return () if self._start.prompt.user_mask.any() else ("no movable tokens",)


class Ideas(Bench):
    """The bench of the ablation, with a moderator by name and a seed for each repair."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.engine = TransformersEngine(args.model)
        self.moderator = resolve_moderator(args.moderator, engine=self.engine, calibration=judge_calibration)
        self.policy = Policy(threshold=args.threshold)
        self.sampling = Sampling(max_new_tokens=args.tokens)
        self.budget = Budget(generations=args.generations)

    async def one(self, name: str, seed: int, item: Flagged) -> dict[str, Any]:
        if name == "halving":
            search = Halving(self, item, seed)
            await search.run()
            found = {"won": search.won, "generations": search.answers, "tokens": search.tokens, "loss": None}
            return {"idea": name, "seed": seed, "id": item.prompt.id, **found}
        idea: Method = RACE if name == "race" else Idea(name, IDEAS[name])
        guard = Guard(item.engine, self.moderator, policy=self.policy, repair=Repair(idea, self.budget, seed=seed))
        trace = (await guard.report(item.prompt.messages, self.sampling)).answer.trace
        won = trace.outcome == "neutralised"
        if won and isinstance(idea, Idea) and idea.chooser is Warm:
            Warm.won(idea.asked[-1])
        first = len((await item.engine.prepare(item.prompt.messages, self.sampling)).token_ids)
        return {
            "idea": name, "seed": seed, "id": item.prompt.id, "won": won, "generations": trace.generations - 1,
            "tokens": trace.generated_tokens - first, "loss": None if trace.final is None else trace.final.score,
        }  # fmt: skip

    async def run(self, name: str, seed: int, flagged: Sequence[Flagged], done: set[str]) -> list[dict[str, Any]]:
        todo = [item for item in flagged if str(item.prompt.id) not in done]
        if name != "warm start":
            return await side_by_side([self.one(name, seed, item) for item in todo])
        Warm.pool.clear()
        return [await self.one(name, seed, item) for item in todo]


def differences(records: Sequence[Mapping[str, Any]], name: str, measure: Callable[..., float]) -> NDArray[np.float64]:
    """Per prompt, its mean over the seeds less that of ``random``."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        found[str(record["id"])][record["idea"]].append(measure(record))
    pairs = [both for both in found.values() if name in both and "random" in both]
    return np.array([np.mean(both[name]) - np.mean(both["random"]) for both in pairs])


def interval(values: NDArray[np.float64]) -> str:
    if len(values) < 3 or np.ptp(values) == 0.0:
        return f"{values.mean() if len(values) else 0.0:+.2f}"
    found = bootstrap((values,), np.mean, n_resamples=4000, rng=np.random.default_rng(0)).confidence_interval
    return f"{values.mean():+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def table(records: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| idea | neutralised | generations | tokens | generations, less random's | tokens, less random's |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in dict.fromkeys(record["idea"] for record in records):
        mine = [record for record in records if record["idea"] == name]
        won = sum(record["won"] for record in mine)
        generations = np.mean([record["generations"] for record in mine])
        tokens = np.mean([record["tokens"] for record in mine])
        lines.append(
            f"| {name} | {won} of {len(mine)} | {generations:.1f} | {tokens:.0f} "
            f"| {interval(differences(records, name, lambda record: record['generations']))} "
            f"| {interval(differences(records, name, lambda record: record['tokens']))} |"
        )
    return "\n".join(lines)


async def main(args: argparse.Namespace) -> None:
    records = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    if args.sum_up:
        print(table(records))
        return
    bench = Ideas(args)
    prompts = read_prompts(args.prompts)[args.start :: args.every][: args.limit]
    flagged = await bench.flagged(prompts)
    print(f"{len(flagged)} of {len(prompts)} first answers flagged at {args.threshold}\n", flush=True)
    for seed in (int(seed) for seed in args.seeds.split(",")):
        for name in args.ideas.split(",") if args.ideas else NAMES:
            done = {str(record["id"]) for record in records if (record["idea"], record["seed"]) == (name, seed)}
            new = await bench.run(name, seed, flagged, done)
            with args.out.open("a", encoding="utf-8") as file:
                file.writelines(f"{json.dumps(record)}\n" for record in new)
            records += new
            print(f"seed {seed}, {name}: {sum(record['won'] for record in new)} of {len(new)}", flush=True)
    print(f"\n{table(records)}")
    await bench.engine.aclose()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--every", type=int, default=1, help="take every n-th prompt, from --start on")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--threshold", type=float, default=0.3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--generations", type=int, default=25, help="the first answer included")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--moderator", default="local")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--sum-up", action="store_true", help="only print the table of what is there")
    parser.add_argument("--ideas", help=f"names with commas between them, of: {', '.join(NAMES)}")
    asyncio.run(main(parser.parse_args()))
