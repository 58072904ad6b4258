"""``tta eval``: methods compared on a set of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tta_middleware.cli import options as opt

COMMAND = "command"
"""Where the context keeps the command as it was typed, for the report."""


def evaluate(
    context: typer.Context,
    prompts: Annotated[Path, typer.Option(metavar="FILE.jsonl", help="One object a line: prompt, and maybe id.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where results.jsonl and the summary go.")],
    methods: Annotated[str, typer.Option(help="Names with commas between them.")] = "none,resample,noise,tsa",
    model: opt.Model = "smollm2",
    moderator: opt.Moderator = "local",
    judge: Annotated[str | None, typer.Option(help="A second judge that no search sees, for the report.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first prompts.")] = None,
    seed: opt.Seed = 0,
    max_new_tokens: opt.MaxNewTokens = 64,
    temperature: opt.Temperature = 0.0,
    threshold: opt.Threshold = None,
    policy: opt.PolicyText = None,
    max_generations: opt.MaxGenerations = 82,
    keep_text: Annotated[bool, typer.Option("--keep-text", help="Do not cut flagged texts to 80 characters.")] = False,
    allow_download: opt.AllowDownload = False,
    json: opt.Json = False,
) -> None:
    """Compare methods: how many flagged answers become safe and usable, and at what cost.

    Writes results.jsonl, summary.json and summary.md to DIR. Run it again to go on where it was cut off.
    """
    from tta_middleware.cli.eval_job import Request, run_eval
    from tta_middleware.cli.parts import policy_of
    from tta_middleware.config import Budget
    from tta_middleware.types import Sampling

    run_eval(
        Request(
            prompts=prompts,
            out=out,
            methods=methods,
            model=model,
            moderator=moderator,
            judge=judge,
            limit=limit,
            policy=policy_of(policy, threshold),
            sampling=Sampling(max_new_tokens, temperature, seed=seed),
            budget=Budget(generations=max_generations),
            keep_text=keep_text,
            allow_download=allow_download,
            command=context.obj[COMMAND],
        ),
        as_json=json,
    )
