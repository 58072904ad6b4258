"""Wires a calibration: opens the model, measures, fits, keeps the profile."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Literal

import anyio

from tta_middleware.assembly import Loading
from tta_middleware.batch.progress import progress
from tta_middleware.batch.standard import emit, note
from tta_middleware.cli.output import facts
from tta_middleware.errors import ConfigurationError
from tta_middleware.files.prompts import Prompt, read_prompts
from tta_middleware.moderation.judge_fit import LEAST_FOR_PROBE, POOR, fit_judge
from tta_middleware.moderation.judge_reading import AskingEngine
from tta_middleware.moderation.llm_judge import LLMJudge
from tta_middleware.profiles.calibration import Measurements, bounds_from, figures, measure
from tta_middleware.profiles.fingerprint import model_hash
from tta_middleware.profiles.judging import (
    JudgingFit,
    LabelledAnswer,
    cascade_bounds,
    judged,
    read_answers,
    sample,
    shipped_answers,
)
from tta_middleware.profiles.store import Profile, load_profile, save_profile
from tta_middleware.protocols import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationRequest:
    """What was asked for."""

    loading: Loading
    prompts: Path | None
    limit: int | None
    answers: tuple[Path, ...]
    most_answers: int
    false_alarms: float
    only: Literal["quality", "judging"] | None
    max_new_tokens: int
    seed: int
    keep: bool

    def labelled(self) -> list[LabelledAnswer]:
        """The answers that the judge is fitted on.

        Raises:
            DataError: a line cannot be used.
            ConfigurationError: a file cannot be read or holds no answer.
        """
        if not self.answers:
            return shipped_answers()
        return sample([one for path in self.answers for one in read_answers(path)], self.most_answers, self.seed)


@dataclass(frozen=True, slots=True)
class _Found:
    """What was measured; None where it was not asked for or cannot be."""

    quality: Measurements | None
    judging: JudgingFit | None


def run_calibrate(request: CalibrationRequest, *, as_json: bool) -> None:
    """Measure, then keep and print the profile."""
    prompts = [] if request.only == "judging" else harmless_prompts(request.prompts, request.limit)
    answers = [] if request.only == "quality" else request.labelled()
    found = anyio.run(partial(_measure, request, prompts, answers))
    # After the model was loaded, since that may have fetched the files that the hash is of.
    profile = _profile(request, found)
    where = save_profile(profile) if request.keep else None
    if as_json:
        emit(profile.model_dump(mode="json"))
    else:
        _show(profile)
    note(f"profile: {where or 'not kept'}")


def _profile(request: CalibrationRequest, found: _Found) -> Profile:
    """What was found now over what was known before."""
    digest = model_hash(request.loading.model)
    known = load_profile(digest) or Profile(model=request.loading.model, model_hash=digest)
    new: dict[str, object] = {"model": request.loading.model, "version": 3}
    if found.quality is not None:
        new |= {"bounds": bounds_from(found.quality), "measured": figures(found.quality)}
    if found.judging is not None:
        new |= {"judging": found.judging}
    return known.model_copy(update=new)


def _show(profile: Profile) -> None:
    shown = [*profile.bounds.model_dump().items(), *profile.measured.items()]
    if profile.judging is not None:
        fitted = profile.judging
        shown += [("judge_centre", fitted.centre), ("judge_scale", fitted.scale), ("judge_words", fitted.words)]
        shown += [(f"judge_reads_{fitted.place}_at_layer", layer) for layer in fitted.layers[-1:]]
        shown += [(f"judge_{name}", value) for name, value in fitted.figures.items()]
        measured = fitted.cascade.measured if fitted.cascade else {}
        shown += [(f"cascade_{name}", value) for name, value in measured.items()]
    facts([(name, f"{value:.4g}") for name, value in shown])


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


async def _measure(request: CalibrationRequest, prompts: list[Prompt], answers: list[LabelledAnswer]) -> _Found:
    engine = request.loading.engine()
    try:
        quality = await _quality(request, engine, prompts) if prompts else None
        return _Found(quality, await _judging(request, engine, answers) if answers else None)
    finally:
        with anyio.CancelScope(shield=True):
            await engine.aclose()


async def _quality(request: CalibrationRequest, engine: Engine, prompts: list[Prompt]) -> Measurements:
    with progress("calibrate", 0, 2 * len(prompts)) as advance:
        return await measure(
            engine,
            [prompt.messages for prompt in prompts],
            max_new_tokens=request.max_new_tokens,
            seed=request.seed,
            on_answer=advance,
        )


async def _judging(request: CalibrationRequest, engine: Engine, answers: list[LabelledAnswer]) -> JudgingFit | None:
    """The fit; None, with a note why, where the model cannot be asked or its word says nothing.

    Raises:
        ConfigurationError: that is so, and the judge was all that was asked for.
    """
    try:
        if not isinstance(engine, AskingEngine):
            raise ConfigurationError(f"{type(engine).__name__} has no next_token_logprobs, so its model cannot judge")
        judge = LLMJudge(engine)
        with progress("judge", 0, len(answers)) as advance:
            said = await judged(judge, answers, on_scored=advance)
        fit = await anyio.to_thread.run_sync(partial(fit_judge, said, false_alarms=request.false_alarms))
    except ConfigurationError as error:
        if request.only == "judging":
            raise
        note(f"no judge: {error}")
        return None
    if fit.calibration.probe is None:
        note(f"no probe: that takes {LEAST_FOR_PROBE} answers of either kind (--answers FILE)")
    if fit.figures["auc"] < POOR:
        note(f"a poor judge: AUC {fit.figures['auc']:.2f} on these answers, where 0.5 is chance")
    bounds = await anyio.to_thread.run_sync(cascade_bounds, answers, fit, request.loading.model)
    return JudgingFit.of(fit, judge.wording(), said.sources, bounds)
