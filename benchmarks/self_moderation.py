"""What it costs when the model that answers judges its answers (``moderator="self"``), in ratios of one run.

    python benchmarks/self_moderation.py --model smollm2
    python benchmarks/self_moderation.py --model /path/to/qwen2.5-coder-0.5b-instruct --stream-only

Three tables in Markdown. Windows: an answer judged as it grows, against every window judged from scratch, by tokens run
and by seconds. Neighbours: how fast others decode while one answer is judged window by window. Stream: a guarded stream
against the same one unguarded. Runs to be compared alternate, and processor seconds stand beside those of the clock,
since a neighbour on the machine slows the clock alone. Both pass the same tokens through the model.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from tta_middleware import Guard, Message, Policy, Repair, Sampling
from tta_middleware.config import Windows
from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.guard.events import Released
from tta_middleware.guard.holdback import Check, HoldBack, Release
from tta_middleware.moderation.llm_judge import LLMJudge
from tta_middleware.policy.coverage import told
from tta_middleware.types import GenerationRequest, RequestScope

ASK = "Explain step by step how bread is baked, from the flour to the finished loaf."
OTHERS = ("Describe a harbour town.", "What is a compiler?", "Tell me about the moon.", "How do bees live?")
PASSES = Policy(threshold=1.0)
"""Nothing is flagged, so that both runs say the same."""


class Meter:
    """Columns that pass through a model, and the time that a block takes."""

    def __init__(self, engine: TransformersEngine) -> None:
        model: Any = engine._loaded
        self._forward, self.columns = model.forward, 0
        model.forward = self._counted

    def _counted(self, rows: Any, packed: Any) -> Any:
        self.columns += rows.shape[1]
        return self._forward(rows, packed)

    async def of(self, work: Callable[[], Awaitable[Any]]) -> tuple[Any, dict[str, float]]:
        columns, clock, spent = self.columns, time.perf_counter(), time.process_time()
        found = await work()
        return found, {
            "columns": self.columns - columns,
            "seconds": time.perf_counter() - clock,
            "cpu": time.process_time() - spent,
        }


def windows_of(text: str, windows: Windows) -> list[str]:
    """What a growing answer's checks see."""
    hold, seen, at = HoldBack(windows.over_all()), list[Check](), 0
    while at < len(text):
        seen += [action for action in hold.feed(text[at : at + 8]) if isinstance(action, Check)]
        at += 8
        for check in [one for one in seen if one.end <= at]:
            if hold._asked and hold._asked[0] == check.end:
                hold.verdict(check.end, safe=True)
    seen += [action for action in hold.finish() if isinstance(action, Check)]
    assert not any(isinstance(action, Release) for action in seen)
    return [check.text for check in seen]


def median(rows: Sequence[dict[str, float]], name: str) -> float:
    return statistics.median(row[name] for row in rows)


def ratio(one: Sequence[dict[str, float]], other: Sequence[dict[str, float]], name: str) -> str:
    return f"{median(one, name) / median(other, name):.2f}"


async def answer_of(engine: TransformersEngine, tokens: int) -> str:
    prompt = await engine.embed([Message("user", ASK)])
    [done] = await engine.generate_batch([GenerationRequest(prompt, Sampling(max_new_tokens=tokens))])
    return done.text


async def windows_table(engine: TransformersEngine, meter: Meter, text: str, runs: int) -> None:
    judge, checks = LLMJudge(engine), windows_of(text, Windows())
    growing: list[dict[str, float]] = []
    scratch: list[dict[str, float]] = []
    furthest = 0.0
    for _ in range(runs):
        scope = RequestScope()
        bound = told(judge, PASSES, scope=scope)

        async def grown(bound: Any = bound) -> list[float]:
            return [(await bound.moderate([window], prompt=ASK))[0].score for window in checks]

        async def anew() -> list[float]:
            found = []
            for window in checks:
                alone = RequestScope()
                found.append((await told(judge, PASSES, scope=alone).moderate([window], prompt=ASK))[0].score)
                alone.close()
            return found

        scores, cost = await meter.of(grown)
        scope.close()
        growing.append(cost)
        others, cost = await meter.of(anew)
        scratch.append(cost)
        furthest = max(furthest, *(abs(a - b) for a, b in zip(scores, others, strict=True)))
    count = len(checks)
    print(f"| windows of an answer of {len(text)} characters | tokens run a window | cpu s a window | s a window |")
    print("|---|---|---|---|")
    for name, rows in (("growing", growing), ("from scratch", scratch)):
        cells = (f"{median(rows, key) / count:.3g}" for key in ("columns", "cpu", "seconds"))
        print(f"| {name} ({count}) | {' | '.join(cells)} |")
    print(f"| ratio | {' | '.join(ratio(growing, scratch, key) for key in ('columns', 'cpu', 'seconds'))} |")
    print(f"\nfurthest scores apart: {furthest:.1e}\n")


async def neighbours_table(engine: TransformersEngine, meter: Meter, text: str, runs: int, tokens: int) -> None:
    judge, checks = LLMJudge(engine), windows_of(text, Windows())
    prompts = [await engine.embed([Message("user", other)]) for other in OTHERS]
    alone: list[dict[str, float]] = []
    beside: list[dict[str, float]] = []

    async def decode() -> None:
        await engine.generate_batch([GenerationRequest(one, Sampling(max_new_tokens=tokens)) for one in prompts])

    async def both() -> None:
        scope = RequestScope()
        bound = told(judge, PASSES, scope=scope)

        async def judging() -> None:
            for window in checks:
                await bound.moderate([window], prompt=ASK)

        await asyncio.gather(decode(), judging())
        scope.close()

    for _ in range(runs):
        alone.append((await meter.of(decode))[1])
        beside.append((await meter.of(both))[1])
    print(f"| {len(prompts)} others decode {tokens} tokens each | tokens run | cpu s | s |")
    print("|---|---|---|---|")
    for name, rows in (("alone", alone), (f"beside {len(checks)} judged windows", beside)):
        print(f"| {name} | {' | '.join(f'{median(rows, key):.3g}' for key in ('columns', 'cpu', 'seconds'))} |")
    print(f"| ratio | {' | '.join(ratio(beside, alone, key) for key in ('columns', 'cpu', 'seconds'))} |\n")


async def stream_table(engine: TransformersEngine, meter: Meter, runs: int, tokens: int) -> None:
    guard = Guard(engine, LLMJudge(engine, name="self"), policy=PASSES, repair=Repair(method=None))
    prompt, sampling = await engine.embed([Message("user", ASK)]), Sampling(max_new_tokens=tokens)
    plain: list[dict[str, float]] = []
    guarded: list[dict[str, float]] = []

    async def bare(began: float) -> float:
        first = 0.0
        async for delta in engine.stream(GenerationRequest(prompt, sampling)):
            if delta.text and not first:
                first = time.perf_counter() - began
        return first

    async def checked(began: float) -> float:
        first = 0.0
        async for event in guard.stream([Message("user", ASK)], sampling):
            if isinstance(event, Released) and not first:
                first = time.perf_counter() - began
        return first

    async def held(began: float) -> float:
        """The unguarded stream until it has as much text as the first window."""
        text, first = "", 0.0
        async for delta in engine.stream(GenerationRequest(prompt, sampling)):
            text += delta.text
            if len(text) >= Windows().first and not first:
                first = time.perf_counter() - began
        return first

    window: list[dict[str, float]] = []
    for run in range(runs + 1):
        for rows, work in ((plain, bare), (window, held), (guarded, checked)):
            began = time.perf_counter()
            first, cost = await meter.of(lambda work=work, began=began: work(began))
            if run:  # the first of each warms up
                rows.append(cost | {"first": first})
    print(f"| stream of {tokens} tokens | tokens run | cpu s | s | s to the first text |")
    print("|---|---|---|---|---|")
    keys = ("columns", "cpu", "seconds", "first")
    for name, rows in (("unguarded", plain), ("unguarded, its first window", window), ("self", guarded)):
        print(f"| {name} | {' | '.join(f'{median(rows, key):.3g}' for key in keys)} |")
    print(f"| self, ratio | {' | '.join(ratio(guarded, plain, key) for key in keys)} |")
    print(f"| ratio to the first window | | | | {ratio(guarded, window, 'first')} |\n")


async def run(asked: argparse.Namespace) -> None:
    engine = TransformersEngine(asked.model, dtype=asked.dtype)
    await engine.load()
    meter = Meter(engine)
    print(f"{asked.model.rsplit('/', 1)[-1]}, {engine._loaded.dtype}\n")
    if not asked.stream_only:
        text = await answer_of(engine, asked.tokens)
        await windows_table(engine, meter, text, asked.runs)
        await neighbours_table(engine, meter, text, asked.runs, asked.tokens // 2)
    await stream_table(engine, meter, asked.runs, asked.tokens)
    await engine.aclose()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tokens", type=int, default=192, help="of an answer")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--stream-only", action="store_true")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
