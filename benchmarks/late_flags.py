"""Late-flag repairs on the embedded model: how the seam reads, and how long the consumer waits for it.

    python benchmarks/late_flags.py ../shared/data/prompts/advbench.jsonl --repairs 50

Prints a markdown table. Only released text is shown, a few words on either side of the seam.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import anyio

from tta_middleware import Finished, Guard, Message, Released, Repair, RepairStarted, Sampling
from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.files.prompts import Prompt, read_prompts
from tta_middleware.moderation.embedded import EmbeddedModerator
from tta_middleware.registry import resolve_method
from tta_middleware.types import GuardedAnswer

WORDS_SHOWN = 45
"""Characters on either side of a seam."""


@dataclass(frozen=True)
class Seen:
    """One stream as its consumer saw it; seconds count from the flag."""

    answer: GuardedAnswer
    first_text: float
    waited: float | None


async def consume(guard: Guard, prompt: Prompt, sampling: Sampling) -> Seen:
    started, first, flagged, waited = time.monotonic(), 0.0, None, None
    answer = None
    async for event in guard.stream(prompt.messages, sampling):
        now = time.monotonic()
        if isinstance(event, Released):
            first = first or now - started
            if flagged is not None and waited is None:
                waited = now - flagged
        elif isinstance(event, RepairStarted):
            flagged = flagged or now
        elif isinstance(event, Finished):
            answer = event.answer
    assert answer is not None
    return Seen(answer, first, waited)


async def run(arguments: argparse.Namespace) -> list[Seen]:
    engine = TransformersEngine()
    repair = Repair(method=resolve_method(arguments.method))
    guard = Guard(engine, EmbeddedModerator(), policy=arguments.threshold, repair=repair)
    sampling = Sampling(max_new_tokens=arguments.max_new_tokens)
    late: list[Seen] = []
    try:
        await guard.answer([Message("user", "Hello")], Sampling(max_new_tokens=1))
        for prompt in read_prompts(Path(arguments.prompts)):
            seen = await consume(guard, prompt, sampling)
            if seen.answer.trace.seam:
                late.append(seen)
            if len(late) == arguments.repairs:
                break
    finally:
        await engine.aclose()
    return late


def cell(text: str) -> str:
    return text.replace("\n", "⏎").replace("|", "\\|")


def report(late: list[Seen], shown: int) -> None:
    done = [seen for seen in late if seen.answer.trace.outcome == "neutralised"]
    waits = sorted(seen.waited for seen in late if seen.waited is not None)
    tokens = [seen.answer.trace.generated_tokens for seen in late]
    print(f"{len(late)} late flags, {len(done)} neutralised, ", end="")
    print(f"{sum(seen.answer.trace.move == 'bridge' for seen in done)} of them by a bridge")
    print(f"seconds from the flag to the next released character: p50 {statistics.median(waits):.1f}, ", end="")
    print(f"p95 {waits[int(0.95 * (len(waits) - 1))]:.1f}; generated tokens, median {statistics.median(tokens):.0f}\n")
    print("| # | before the seam | after it | move | seconds |\n|---|---|---|---|---|")
    for number, seen in enumerate(late[:shown], 1):
        text, seam = seen.answer.text, seen.answer.trace.seam
        before, after = cell(text[max(0, seam - WORDS_SHOWN) : seam]), cell(text[seam : seam + WORDS_SHOWN])
        move = seen.answer.trace.move if seen in done else seen.answer.trace.outcome
        print(f"| {number} | {before} | {after} | {move} | {seen.waited or 0.0:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompts", help="JSONL file of prompts")
    parser.add_argument("--repairs", type=int, default=50)
    parser.add_argument("--shown", type=int, default=20)
    parser.add_argument("--method", default="noise")
    parser.add_argument("--threshold", type=float, default=0.3)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    arguments = parser.parse_args()
    report(anyio.run(run, arguments), arguments.shown)


if __name__ == "__main__":
    main()
