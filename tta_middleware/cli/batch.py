"""``tta batch``: guarded answers for a file of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tta_middleware.cli import options as opt
from tta_middleware.cli.failures import FAILED, OK, USAGE

_CONCURRENCY = (
    "Prompts under way at once. More is faster, but lines come as they are done, and in bfloat16 the rounding of a "
    "larger batch may change the wording of answers."
)


def batch(
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="One object a line: prompt or messages, id.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="One object a line is added here.")],
    model: opt.Model = "smollm2",
    moderator: opt.Moderator = "local",
    method: opt.Method = opt.DEFAULT_METHOD,
    threshold: opt.Threshold = None,
    policy: opt.PolicyText = None,
    max_new_tokens: opt.MaxNewTokens = 256,
    temperature: opt.Temperature = 0.0,
    seed: opt.Seed = 0,
    max_generations: opt.MaxGenerations = 82,
    concurrency: Annotated[int, typer.Option(min=1, help=_CONCURRENCY)] = 1,
    allow_download: opt.AllowDownload = False,
    json: opt.Json = False,
) -> None:
    """Answer every prompt of a file; run it again to go on where it was cut off.

    Prompts whose id is in OUT.jsonl are skipped. A line that cannot be read gets an object with 'error'; the exit code
    is then 2, or 1 if the model failed on a prompt.
    """
    from tta_middleware.cli.batch_job import run_batch
    from tta_middleware.cli.parts import Answering, policy_of
    from tta_middleware.config import Budget
    from tta_middleware.types import Sampling

    answering = Answering(
        model=model,
        moderator=moderator,
        method=method,
        policy=policy_of(policy, threshold),
        sampling=Sampling(max_new_tokens, temperature, seed=seed),
        budget=Budget(generations=max_generations),
        allow_download=allow_download,
    )
    tally = run_batch(answering, source, target, concurrency, as_json=json)
    raise typer.Exit(USAGE if tally.broken else FAILED if tally.failed else OK)
