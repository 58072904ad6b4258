"""Many guarded chats at once, a share of them repaired, against the raw engine in the same run.

    python benchmarks/guarded_load.py ../shared/data/prompts/advbench.jsonl --chats 64 --share 0.33

The file holds prompts whose answers get flagged. Those of its first ``--look-at`` whose raw greedy answer the moderator
flags are chosen until the share is full (before any time is taken); the other chats are harmless. Then the same chats
are streamed from the raw engine and through the guard, in turn, all at once. Tokens of guarded chats are all that the
engine decoded for them, repair candidates included. No prompt and no answer is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import anyio

from tta_middleware import Guard, Message, Repair, Sampling
from tta_middleware.cli.bench_load import guarded, peak_memory, raw
from tta_middleware.cli.bench_prompts import harmless_prompts
from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.evaluation.datasets import read_prompts
from tta_middleware.moderation.embedded import EmbeddedModerator
from tta_middleware.policy import Policy
from tta_middleware.registry import resolve_method
from tta_middleware.types import GenerationRequest

Chat = Sequence[Message]


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


async def measure(options: argparse.Namespace) -> dict:
    engine = TransformersEngine(options.model, max_batch=options.max_batch, dtype=options.dtype)
    moderator = EmbeddedModerator()
    sampling = Sampling(max_new_tokens=options.max_new_tokens)
    guard = Guard(
        engine,
        moderator,
        policy=Policy(threshold=options.threshold),
        repair=Repair(method=resolve_method(options.method)),
    )
    try:
        flagged = await flagged_ones(engine, moderator, options, sampling)
        harmless = harmless_prompts(options.chats - len(flagged), options.seed)
        chats: list[Chat] = [[Message("user", text)] for text in harmless]
        gap = max(1, round(options.chats / max(1, len(flagged))))
        for index, chat in enumerate(flagged):
            chats.insert(index * gap, chat)
        prompts = [await engine.embed(chat) for chat in chats]
        after_load, runs = peak_memory(), []
        for _ in range(options.repeat):
            bare = await raw(engine, prompts, sampling, len(chats), time.perf_counter)
            behind = await guarded(guard, chats, sampling, len(chats), time.perf_counter)
            runs.append(
                {
                    "raw": bare.as_record(),
                    "guarded": {**behind.as_record(), "outcomes": dict(behind.outcomes)},
                    "guarded_against_raw_by_clock": round(behind.rate / bare.rate, 3),
                    "guarded_against_raw_by_cpu": round(behind.cpu_rate / bare.cpu_rate, 3),
                }
            )
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
    parser.add_argument("--look-at", type=int, default=128)
    parser.add_argument("--chats", type=int, default=64)
    parser.add_argument("--share", type=float, default=1 / 3)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--method", default="noise")
    parser.add_argument("--threshold", type=float, default=0.3)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    print(json.dumps(anyio.run(measure, parser.parse_args())))


if __name__ == "__main__":
    main()
