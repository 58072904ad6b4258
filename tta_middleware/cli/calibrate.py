"""``tta calibrate``: bounds of the quality gate for one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tta_middleware.cli import options as opt


@opt.grouped(opt.LoadingOptions)
def calibrate(
    asked: opt.LoadingOptions,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Harmless prompts; by default 60 that come along.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first prompts.")] = None,
    max_new_tokens: opt.MaxNewTokens = 64,
    seed: opt.Seed = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the profile, do not keep it.")] = False,
    json: opt.Json = False,
) -> None:
    """Measure what usable answers of a model look like, and keep it as the model's profile.

    The profile is found by the hash of the model's weights from then on. Takes some minutes on a CPU.
    """
    from tta_middleware.cli.calibrate_job import CalibrationRequest, run_calibrate

    run_calibrate(
        CalibrationRequest(
            loading=asked.loading(),
            prompts=prompts,
            limit=limit,
            max_new_tokens=max_new_tokens,
            seed=seed,
            keep=not dry_run,
        ),
        as_json=json,
    )
