"""``tta tune``: settings of a repair method for one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tta_middleware.cli import options as opt
from tta_middleware.cli.grouped import grouped


@grouped(opt.Loading)
def tune(
    prompts: Annotated[Path, typer.Option(metavar="FILE.jsonl", help="Prompts whose answers are flagged, 20 or so.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the trials and the front go.")],
    loading: opt.Loading,
    method: opt.Method = opt.DEFAULT_METHOD,
    trials: Annotated[int, typer.Option(min=1, help="Trials in all, those of earlier runs in DIR included.")] = 20,
    moderator: opt.Moderator = "local",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first prompts.")] = None,
    seed: opt.Seed = 0,
    max_new_tokens: opt.MaxNewTokens = 48,
    threshold: opt.Threshold = None,
    policy: opt.PolicyText = None,
    max_generations: opt.MaxGenerations = 12,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Leave the model's profile alone.")] = False,
    json: opt.Json = False,
) -> None:
    """Search for a method's settings on a small set of prompts, and keep the winner in the model's profile.

    The first trial has the settings as they are. Run it again to go on where it was cut off, or with more trials.
    """
    from tta_middleware.cli.parts import policy_of
    from tta_middleware.cli.tune_job import Request, run_tune
    from tta_middleware.config import Budget
    from tta_middleware.types import Sampling

    run_tune(
        Request(
            prompts=prompts,
            out=out,
            loading=loading,
            method=method,
            trials=trials,
            moderator=moderator,
            limit=limit,
            policy=policy_of(policy, threshold),
            sampling=Sampling(max_new_tokens, seed=seed),
            budget=Budget(generations=max_generations),
            keep=not dry_run,
        ),
        as_json=json,
    )
