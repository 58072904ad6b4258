"""Wires a calibration: opens the model, measures, keeps the profile."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path

import anyio

from tta_middleware.assembly import Loading
from tta_middleware.batch.progress import progress
from tta_middleware.batch.standard import emit, note
from tta_middleware.cli.output import facts
from tta_middleware.files.prompts import Prompt, read_prompts
from tta_middleware.profiles.calibration import Measurements, bounds_from, figures, measure
from tta_middleware.profiles.fingerprint import model_hash
from tta_middleware.profiles.store import Profile, save_profile


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationRequest:
    """What was asked for."""

    loading: Loading
    prompts: Path | None
    limit: int | None
    max_new_tokens: int
    seed: int
    keep: bool


def run_calibrate(request: CalibrationRequest, *, as_json: bool) -> None:
    """Measure, then keep and print the profile."""
    prompts = harmless_prompts(request.prompts, request.limit)
    found = anyio.run(partial(_measure, request, prompts))
    # After the model was loaded, since that may have fetched the files that the hash is of.
    digest = model_hash(request.loading.model)
    profile = Profile(
        model=request.loading.model,
        model_hash=digest,
        bounds=bounds_from(found),
        measured=figures(found),
    )
    where = save_profile(profile) if request.keep else None
    if as_json:
        emit(profile.model_dump(mode="json"))
    else:
        facts(
            [(name, f"{value:.4g}") for name, value in (profile.bounds.model_dump() | dict(profile.measured)).items()]
        )
    note(f"profile: {where or 'not kept'}")


def harmless_prompts(path: Path | None = None, limit: int | None = None) -> list[Prompt]:
    """The prompts of a file, or those that come with the package.

    Raises:
        ConfigurationError: the file cannot be read or holds no prompt.
        DataError: a line of it cannot be used.
    """
    if path is not None:
        return read_prompts(path, limit)
    with resources.as_file(resources.files("tta_middleware") / "data" / "harmless.jsonl") as shipped:
        return read_prompts(shipped, limit)


async def _measure(request: CalibrationRequest, prompts: list[Prompt]) -> Measurements:
    engine = request.loading.engine()
    try:
        with progress("calibrate", 0, 2 * len(prompts)) as advance:
            return await measure(
                engine,
                [prompt.messages for prompt in prompts],
                max_new_tokens=request.max_new_tokens,
                seed=request.seed,
                on_answer=advance,
            )
    finally:
        with anyio.CancelScope(shield=True):
            await engine.aclose()
