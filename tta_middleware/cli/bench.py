"""``tta bench``: how fast the engine at hand decodes, raw and guarded."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from tta_middleware.cli import options as opt

_SEQUENCES = "Numbers of sequences that decode side by side, with commas between them."
_QUICK = "Fewer and shorter answers: some seconds on a small model, and rougher figures."


@opt.grouped(opt.AnswerOptions, max_new_tokens=64)
def bench(
    asked: opt.AnswerOptions,
    sequences: Annotated[str, typer.Option(metavar="N,...", help=_SEQUENCES)] = "1,4,8,16,32",
    chats: Annotated[int, typer.Option(min=1, help="Chats that the guarded part answers.")] = 64,
    concurrency: Annotated[int, typer.Option(min=1, help="Chats under way at once.")] = 32,
    repeat: Annotated[int, typer.Option(min=1, help="Runs of each measurement; the fastest counts.")] = 2,
    quick: Annotated[bool, typer.Option("--quick", help=_QUICK)] = False,
    json: opt.Json = False,
) -> None:
    """Measure tokens per second, raw and guarded, the time to the first token, and memory; prints one JSON object.

    The prompts are harmless and drawn by --seed. Loading the model is not counted.
    """
    from tta_middleware.cli.bench_job import BenchRequest, parse_levels, run_bench

    if quick:
        asked, chats, repeat = replace(asked, max_new_tokens=min(asked.max_new_tokens, 16)), min(chats, 8), 1
    levels = parse_levels(sequences)
    run_bench(
        BenchRequest(
            answering=asked.answering(),
            levels=tuple(level for level in levels if level <= 8) or levels[:1] if quick else levels,
            chats=chats,
            concurrency=concurrency,
            repeat=repeat,
        )
    )
