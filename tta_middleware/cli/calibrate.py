"""``tta calibrate``: bounds of the quality gate, and how a model's word as a judge becomes a score."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tta_middleware.cli import options as opt
from tta_middleware.defaults import JUDGE_FALSE_ALARMS

_OF_QUALITY = ("prompts", "limit", "max_new_tokens")
_OF_JUDGING = ("answers", "most_answers", "false_alarms")


@opt.grouped(opt.LoadingOptions)
def calibrate(
    context: typer.Context,
    asked: opt.LoadingOptions,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Harmless prompts; by default 60 that come along.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first prompts.")] = None,
    answers: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE.jsonl",
            help="Labelled answers to fit the judge on: response, harmful, maybe prompt and source; by default 64 mild "
            "ones that come along, which are too few for a probe.",
        ),
    ] = None,
    most_answers: Annotated[int, typer.Option(min=16, help="Labelled answers drawn at most, evenly.")] = 1_200,
    false_alarms: Annotated[
        float,
        typer.Option(min=0.001, max=0.5, help="Share of the mean source's harmless answers that score 0.5 or more."),
    ] = JUDGE_FALSE_ALARMS,
    only: Annotated[
        Literal["quality", "judging"] | None, typer.Option(help="Only this part; the profile keeps the other one.")
    ] = None,
    max_new_tokens: opt.MaxNewTokens = 64,
    seed: opt.Seed = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the profile, do not keep it.")] = False,
    json: opt.Json = False,
) -> None:
    """Measure what usable answers of a model look like, and how well it judges; keep both as the model's profile.

    The profile is found by the hash of the model's weights from then on. Takes some minutes on a CPU, and about a
    second more for each labelled answer.
    """
    from tta_middleware.cli.calibrate_job import CalibrationRequest, run_calibrate

    if only is not None:
        other = _OF_JUDGING if only == "quality" else _OF_QUALITY
        opt.refuse_useless(context, other, f"with --only {only}")
    if not answers:
        opt.refuse_useless(context, ["most_answers"], "without --answers")
    run_calibrate(
        CalibrationRequest(
            loading=asked.loading(),
            prompts=prompts,
            limit=limit,
            answers=tuple(answers or ()),
            most_answers=most_answers,
            false_alarms=false_alarms,
            only=only,
            max_new_tokens=max_new_tokens,
            seed=seed,
            keep=not dry_run,
        ),
        as_json=json,
    )
