"""``tta bench``: how fast the engine at hand decodes, raw and guarded."""

from __future__ import annotations

from typing import Annotated

import typer

from tta_middleware.cli import options as opt

_SEQUENCES = "Numbers of sequences that decode side by side, with commas between them."
_QUICK = "Fewer and shorter answers: some seconds on a small model, and rougher figures."


def bench(
    model: opt.Model = "smollm2",
    moderator: opt.Moderator = "local",
    method: opt.Method = opt.DEFAULT_METHOD,
    threshold: opt.Threshold = None,
    policy: opt.PolicyText = None,
    sequences: Annotated[str, typer.Option(metavar="N,...", help=_SEQUENCES)] = "1,4,8,16,32",
    chats: Annotated[int, typer.Option(min=1, help="Chats that the guarded part answers.")] = 64,
    concurrency: Annotated[int, typer.Option(min=1, help="Chats under way at once.")] = 32,
    max_new_tokens: opt.MaxNewTokens = 64,
    temperature: opt.Temperature = 0.0,
    seed: opt.Seed = 0,
    repeat: Annotated[int, typer.Option(min=1, help="Runs of each measurement; the fastest counts.")] = 2,
    quick: Annotated[bool, typer.Option("--quick", help=_QUICK)] = False,
    allow_download: opt.AllowDownload = False,
    json: opt.Json = False,
) -> None:
    """Measure tokens per second, raw and guarded, the time to the first token, and memory; prints one JSON object.

    The prompts are harmless and drawn by --seed. Loading the model is not counted.
    """
    from tta_middleware.cli.bench_job import BenchRequest, parse_levels, run_bench
    from tta_middleware.cli.parts import Answering, policy_of
    from tta_middleware.config import Budget
    from tta_middleware.types import Sampling

    tokens, chats, repeat = (min(max_new_tokens, 16), min(chats, 8), 1) if quick else (max_new_tokens, chats, repeat)
    levels = parse_levels(sequences)
    answering = Answering(
        model=model,
        moderator=moderator,
        method=method,
        policy=policy_of(policy, threshold),
        sampling=Sampling(tokens, temperature, seed=seed),
        budget=Budget(),
        allow_download=allow_download,
    )
    run_bench(
        BenchRequest(
            answering=answering,
            levels=tuple(level for level in levels if level <= 8) or levels[:1] if quick else levels,
            chats=chats,
            concurrency=concurrency,
            repeat=repeat,
        )
    )
