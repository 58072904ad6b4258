"""Many guarded chats at once, a share of them repaired, against the raw engine in the same run.

    python benchmarks/guarded_load.py ../shared/data/prompts/advbench.jsonl

The file holds prompts whose answers get flagged. Those of its first ``--look-at`` whose raw greedy answer the moderator
flags are chosen until the share is full (before any time is taken); the other chats are harmless. Then the same chats
are streamed from the raw engine and through the guard, in turn, ``--concurrency`` at a time. Tokens are all that the
engine decoded, repair candidates included. No prompt and no answer is printed.

``steady`` is the part of a run in which as many chats are under way as may be: from the first answer's end to the last
chat's beginning. In what follows, the last repairs run on alone, one candidate after the other, and leave most of the
batch empty; with as many chats as ``--concurrency`` nothing is steady.

``columns`` are those that ran beside the decode steps: of first prompts, of candidates' prompts, of texts to score, and
of beginnings that several share. Neighbours on the machine do not change them.

``--cpu`` takes the time in processor seconds of this process over its threads, which an idle machine would take by the
clock: what to read where others are at work on the machine.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio

from tta_middleware import Guard, Message, Repair, Sampling
from tta_middleware.cli.bench_load import Clock, Load, guarded, peak_memory, quantiles, raw
from tta_middleware.cli.bench_prompts import harmless_prompts
from tta_middleware.engines.decoding.feeds import Feed, Joining
from tta_middleware.engines.decoding.running_batch import Batch
from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.files.prompts import read_prompts
from tta_middleware.methods import Race
from tta_middleware.moderation.embedded import EmbeddedModerator
from tta_middleware.policy import Policy
from tta_middleware.registry import resolve_method
from tta_middleware.types import GenerationRequest

Chat = Sequence[Message]


class Chats(list[Any]):
    """Prompts or conversations that note when they are taken."""

    def __init__(self, items: Sequence[Any], engine: TransformersEngine, concurrency: int, clock: Clock) -> None:
        super().__init__(items)
        self._engine, self._concurrency, self._clock = engine, concurrency, clock
        self._marks: list[tuple[float, int]] = []

    def __getitem__(self, index: Any) -> Any:
        self._marks.append((self._clock(), self._engine.stats().tokens))
        return super().__getitem__(index)

    def steady_rate(self) -> float | None:
        """Tokens a second between the first chat that had to wait for another's end and the last one's beginning."""
        marks = self._marks[self._concurrency :]
        if len(marks) < self._concurrency:
            return None
        (start, before), (end, after) = marks[0], marks[-1]
        return (after - before) / (end - start)


class Columns:
    """Counts what runs beside the decode steps, in a ``with`` block; the decode thread writes, read it after its end.

    Attributes:
        found: columns by what they were for.
    """

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self._begun: set[int] = set()
        self._take, self._build = Batch._take_logits, Batch._build_head

    def __enter__(self) -> Counter[str]:
        take, build = self._take, self._build

        def counted(batch: Batch, decoding: Any, chosen: Any, logits: Any) -> int:
            for job, segment in chosen:
                self.found[self._kind(job)] += len(segment.rows)
            return take(batch, decoding, chosen, logits)

        def built(batch: Batch, feed: Feed) -> None:
            self.found["beginnings"] += feed.left
            build(batch, feed)

        Batch._take_logits, Batch._build_head = counted, built  # type: ignore[method-assign]
        return self.found

    def __exit__(self, *_: object) -> None:
        Batch._take_logits, Batch._build_head = self._take, self._build  # type: ignore[method-assign]

    def _kind(self, job: Any) -> str:
        if not isinstance(job, Joining):
            return "texts"
        kind = "candidates" if job.row.ticket in self._begun else "first prompts"
        self._begun.add(job.row.ticket)
        return kind


async def flagged_ones(
    engine: TransformersEngine, moderator: EmbeddedModerator, options: argparse.Namespace, sampling: Sampling
) -> list[Chat]:
    """Chats of the file whose raw answer is flagged, at most the share that is wanted."""
    policy = Policy(threshold=options.threshold)
    wanted = round(options.share * options.chats)
    found: list[Chat] = []
    chats = [prompt.messages for prompt in read_prompts(Path(options.prompts), options.look_at)]
    for start in range(0, len(chats), 32):
        group = chats[start : start + 32]
        requests = [GenerationRequest(await engine.embed(chat), sampling) for chat in group]
        texts = [completion.text for completion in await engine.generate_batch(requests)]
        verdicts = await moderator.moderate(texts)
        found += [chat for chat, verdict in zip(group, verdicts, strict=True) if policy.decide(verdict).flagged]
        if len(found) >= wanted:
            break
    return found[:wanted]


def compared(bare: Load, bare_steady: float | None, behind: Load, behind_steady: float | None) -> dict[str, Any]:
    """Both runs side by side."""
    record: dict[str, Any] = {
        "raw": bare.as_record(),
        "guarded": {
            **behind.as_record(),
            "outcomes": dict(behind.outcomes),
            "first_token_seconds_by_outcome": {
                outcome: quantiles(waits) for outcome, waits in behind.first_by_outcome.items()
            },
        },
        "guarded_against_raw_by_clock": round(behind.rate / bare.rate, 3),
        "guarded_against_raw_by_cpu": round(behind.cpu_rate / bare.cpu_rate, 3),
    }
    if bare_steady and behind_steady:
        record["raw"]["steady_tokens_per_second"] = round(bare_steady, 1)
        record["guarded"]["steady_tokens_per_second"] = round(behind_steady, 1)
        record["guarded_against_raw_while_steady"] = round(behind_steady / bare_steady, 3)
    return record


def processor_clock() -> Clock:
    """Processor seconds of this process, divided by the threads that may share them."""
    import torch

    threads = torch.get_num_threads()
    return lambda: time.process_time() / threads


async def measure(options: argparse.Namespace) -> dict:
    engine = TransformersEngine(options.model, max_batch=options.max_batch, dtype=options.dtype)
    moderator = EmbeddedModerator()
    sampling = Sampling(max_new_tokens=options.max_new_tokens)
    guard = Guard(
        engine,
        moderator,
        policy=Policy(threshold=options.threshold),
        repair=Repair(method=Race(wave="free") if options.free_places else resolve_method(options.method)),
    )
    try:
        flagged = await flagged_ones(engine, moderator, options, sampling)
        harmless = harmless_prompts(options.chats - len(flagged), options.seed)
        chats: list[Chat] = [[Message("user", text)] for text in harmless]
        gap = max(1, round(options.chats / max(1, len(flagged))))
        for index, chat in enumerate(flagged):
            chats.insert(index * gap, chat)
        prompts = [await engine.embed(chat) for chat in chats]
        clock = processor_clock() if options.cpu else time.perf_counter
        after_load, runs = peak_memory(), []
        for _ in range(options.repeat):
            bare_chats = Chats(prompts, engine, options.concurrency, clock)
            with Columns() as bare_columns:
                bare = await raw(engine, bare_chats, sampling, options.concurrency, clock)
            guarded_chats = Chats(chats, engine, options.concurrency, clock)
            with Columns() as columns:
                behind = await guarded(guard, guarded_chats, sampling, options.concurrency, clock)
            run = compared(bare, bare_chats.steady_rate(), behind, guarded_chats.steady_rate())
            runs.append({**run, "columns": {"raw": dict(bare_columns), "guarded": dict(columns)}})
            print(json.dumps(runs[-1]), flush=True)
    finally:
        await engine.aclose()
    return {
        **{name: value for name, value in vars(options).items() if name != "prompts"},
        "prompts": Path(options.prompts).name,
        "chosen_as_flagged": len(flagged),
        "runs": runs,
        "peak_memory": {"before": after_load, "at_the_end": peak_memory()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompts", help="JSONL file of prompts whose answers get flagged")
    parser.add_argument("--look-at", type=int, default=200)
    parser.add_argument("--chats", type=int, default=256)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--share", type=float, default=1 / 3)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--method", default="race")
    parser.add_argument(
        "--free-places", action="store_true", help="race whose later rungs take the engine's free places"
    )
    parser.add_argument("--threshold", type=float, default=0.3)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="take the time in processor seconds")
    print(json.dumps(anyio.run(measure, parser.parse_args())))


if __name__ == "__main__":
    main()
