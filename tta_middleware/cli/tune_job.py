"""Wires a tuning: finds the flagged prompts, runs what trials are missing, keeps the winner."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anyio

from tta_middleware.cli.options import Loading
from tta_middleware.cli.output import emit, note, say
from tta_middleware.cli.parts import opened
from tta_middleware.cli.progress import progress, resumable
from tta_middleware.config import Budget
from tta_middleware.errors import ConfigurationError, DataError
from tta_middleware.evaluation.tuning import FLAGGED, Evaluate, Study, Trial, front, winner
from tta_middleware.files.prompts import Prompt, read_prompts
from tta_middleware.guard.guard import Guard, Repair
from tta_middleware.methods.base import Method
from tta_middleware.policy import Policy
from tta_middleware.profiles.fingerprint import model_hash
from tta_middleware.profiles.store import Profile, load_profile, quality_for, save_profile
from tta_middleware.protocols import Engine, Moderator
from tta_middleware.registry import resolve_method
from tta_middleware.types import Sampling

FRONT = "front.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked for."""

    prompts: Path
    out: Path
    loading: Loading
    method: str
    trials: int
    moderator: str
    limit: int | None
    policy: Policy
    sampling: Sampling
    budget: Budget
    keep: bool

    def settings(self) -> dict[str, Any]:
        """What trials must share to be compared."""
        return {
            "prompts_sha256": hashlib.sha256(self.prompts.read_bytes()).hexdigest(),
            "limit": self.limit,
            "model_hash": model_hash(self.loading.model),
            **self.loading.hardware,
            "moderator": self.moderator,
            "policy": self.policy.model_dump(mode="json"),
            "seed": self.sampling.seed,
            "max_new_tokens": self.sampling.max_new_tokens,
            "budget": self.budget.model_dump(mode="json"),
        }


def run_tune(request: Request, *, as_json: bool) -> None:
    """Run the missing trials, then write and print the front, and keep the winner."""
    method = resolve_method(request.method)
    if method is None:
        raise ConfigurationError("the method 'none' has no settings")
    prompts = read_prompts(request.prompts, request.limit)
    _make(request.out)
    study = Study(request.out, method, seed=request.sampling.seed)
    with resumable():
        anyio.run(partial(_run, request, study, prompts))
    trials = study.finished
    best, kept = winner(trials), front(trials)
    report = {"method": method.name, "trials": len(trials), "first": trials[0].as_dict(), "winner": best.as_dict()}
    report["front"] = [trial.as_dict() for trial in kept]
    (request.out / FRONT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    emit(report) if as_json else say(_table(trials[0], kept))
    note(f"profile: {_keep(request, method, best) if request.keep else 'left alone'}")


async def _run(request: Request, study: Study, prompts: list[Prompt]) -> None:
    done = len(study.finished)
    if done >= request.trials:
        return
    async with opened(request.loading, request.moderator) as (engine, moderator):
        guards = partial(_guard, request, engine, moderator)
        flagged = await _flagged(request, prompts, Evaluate(guards, prompts, request.sampling))
        evaluate = Evaluate(guards, flagged, request.sampling)
        with progress("tune", done, request.trials) as advance:
            for _ in range(request.trials - done):
                trial = await study.run(evaluate)
                advance(f"{trial.neutralised} of {trial.prompts} neutralised, move {trial.move:.2f}")


def _guard(request: Request, engine: Engine, moderator: Moderator, method: Method | None) -> Guard:
    repair = Repair(method=method, budget=request.budget, seed=request.sampling.seed)
    return Guard(engine, moderator, policy=request.policy, repair=repair, quality=quality_for(request.loading.model))


async def _flagged(request: Request, prompts: Sequence[Prompt], undefended: Evaluate) -> list[Prompt]:
    """The prompts whose undefended answer is flagged: found once and noted in the folder.

    Raises:
        ConfigurationError: the folder is another tuning's, or no answer is flagged.
    """
    path, settings = request.out / FLAGGED, request.settings()
    if path.exists():
        ids = _noted(path, settings)
    else:
        traces = await undefended(None)
        ids = [str(prompt.id) for prompt, trace in zip(prompts, traces, strict=True) if trace.outcome == "blocked"]
        path.write_text(json.dumps({"settings": settings, "flagged": ids}, indent=2) + "\n", encoding="utf-8")
    if not ids:
        raise ConfigurationError("no answer to these prompts is flagged; give others, or a lower --threshold")
    return [prompt for prompt in prompts if str(prompt.id) in ids]


def _noted(path: Path, settings: dict[str, Any]) -> list[str]:
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
        before, ids = dict(noted["settings"]), [str(id_) for id_ in noted["flagged"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{path} cannot be read; give another --out") from None
    differ = sorted(key for key in before | settings if before.get(key) != settings.get(key))
    if differ:
        raise ConfigurationError(
            f"{path.parent} holds trials with other settings ({', '.join(differ)}); give another --out"
        )
    return ids


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"cannot write to the folder {folder}: {error.strerror}") from None


def _keep(request: Request, method: Method, best: Trial) -> Path:
    digest = model_hash(request.loading.model)
    profile = load_profile(digest) or Profile(model=request.loading.model, model_hash=digest)
    tuned = {**profile.tuned, method.name: dict(best.settings)}
    return save_profile(profile.model_copy(update={"tuned": tuned}))


def _table(first: Trial, kept: Sequence[Trial]) -> str:
    """The front in Markdown, with the settings as they are for comparison."""
    head = "| trial | neutralised | mean move | tokens a prompt | settings |\n|---:|---:|---:|---:|---|"
    rows = [_row("as it is", first), *(_row(str(trial.number), trial) for trial in kept)]
    return "\n".join([head, *rows])


def _row(name: str, trial: Trial) -> str:
    settings = ", ".join(f"{key} {_short(value)}" for key, value in trial.settings.items())
    return f"| {name} | {trial.neutralised} of {trial.prompts} | {trial.move:.2f} | {trial.tokens:.0f} | {settings} |"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"({len(value)} items)" if isinstance(value, list) else str(value)
