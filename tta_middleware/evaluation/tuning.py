"""Search for a method's settings on a small set of prompts (extra ``tune``).

Optuna proposes, the guard answers, and two goals are weighed: the share of flagged answers that become safe and
usable, and how far the prompt was moved for it. Every finished trial is in a journal file, so a run can be cut off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias, cast

import anyio

from tta_middleware.config import Settings
from tta_middleware.errors import EngineError, MissingExtraError, ModerationUnavailableError
from tta_middleware.evaluation.spaces import Kind, Scale, as_is, space_of, suggest
from tta_middleware.files.prompts import Prompt
from tta_middleware.guard.guard import Guard
from tta_middleware.methods.base import Method
from tta_middleware.types import Sampling, Trace

JOURNAL: Final = "journal.log"
FLAGGED: Final = "flagged.json"
NEIGHBOURS: Final = 8
"""Prompts that are answered side by side."""

GuardFactory: TypeAlias = Callable[[Method | None], Guard]


@dataclass(frozen=True, slots=True)
class Trial:
    """How one choice of settings did on the flagged prompts.

    Attributes:
        neutralised: how many of ``prompts`` became safe and usable.
        move: mean relative move, where 1 stands for a prompt that was not neutralised.
        tokens: mean tokens generated for a prompt, the first answer included.
    """

    number: int
    settings: Mapping[str, Any]
    prompts: int
    neutralised: int
    move: float
    tokens: float

    @property
    def share(self) -> float:
        return self.neutralised / self.prompts

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON-ready data."""
        figures = ("number", "prompts", "neutralised", "move", "tokens")
        return {name: getattr(self, name) for name in figures} | {"settings": dict(self.settings)}


class Study:
    """The trials of one method in a folder; opening it again goes on with them.

    Raises:
        MissingExtraError: optuna is not installed.
        ConfigurationError: the method cannot be tuned.
    """

    def __init__(self, folder: Path, method: Method, *, seed: int = 0) -> None:
        try:
            import optuna
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend
        except ImportError as missing:
            raise MissingExtraError("tuning needs the extra: pip install 'tta-middleware[tune]'") from missing
        self._optuna, self._seed = optuna, seed
        self._space, self._method = space_of(method), method
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(folder / JOURNAL))),
            study_name=method.name,
            directions=["maximize", "minimize"],
            load_if_exists=True,
        )
        if not self._study.trials:
            # The settings as they are come first, so that the winner is no worse than they on these prompts.
            self._study.enqueue_trial({name: as_is(method, name, kind) for name, kind in self._space.items()})

    @property
    def finished(self) -> list[Trial]:
        """Trials with results, in order."""
        done = self._optuna.trial.TrialState.COMPLETE
        return [_trial(trial) for trial in self._study.get_trials(deepcopy=False) if trial.state == done]

    async def run(self, evaluate: Evaluate) -> Trial:
        """One more trial.

        Raises:
            EngineError: no answer was flagged, so there was nothing to repair.
        """
        # Seeded by what is there, so that a run that was cut off goes on as if it had not been.
        self._study.sampler = self._optuna.samplers.TPESampler(seed=self._seed + len(self.finished))
        trial = self._study.ask()
        settings = {name: self._setting(name, kind, suggest(trial, name, kind)) for name, kind in self._space.items()}
        traces = await evaluate(cast(Callable[..., Method], type(self._method))(**settings))
        # In low precision a first answer depends on its batch a little, so one that was flagged may be clean this time.
        flagged = [trace for trace in traces if trace.outcome != "clean"]
        if not flagged:
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
            raise EngineError("no answer was flagged in a trial; give more prompts, or those whose answers are flagged")
        moves = [trace.relative_move if trace.outcome == "neutralised" else 1.0 for trace in flagged]
        neutralised = sum(trace.outcome == "neutralised" for trace in flagged)
        trial.set_user_attr("settings", settings)
        trial.set_user_attr("prompts", len(flagged))
        trial.set_user_attr("neutralised", neutralised)
        trial.set_user_attr("tokens", sum(trace.generated_tokens for trace in flagged) / len(flagged))
        self._study.tell(trial, [neutralised / len(flagged), sum(moves) / len(moves)])
        return self.finished[-1]

    def _setting(self, name: str, kind: Kind, value: Any) -> Any:
        if not isinstance(kind, Scale):
            return value
        items = cast(Settings, self._method).model_dump(mode="json")[name]
        return [item | {kind.field: round(value * item[kind.field], 4)} for item in items]


class Evaluate:
    """Answers prompts with a method, a few side by side."""

    def __init__(self, guards: GuardFactory, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        self._guards, self._prompts, self._sampling = guards, prompts, sampling

    async def __call__(self, method: Method | None) -> list[Trace]:
        """One trace per prompt.

        Raises:
            EngineError: the model failed.
            ModerationUnavailableError: an answer could not be scored, so the trial says nothing.
        """
        guard, traces = self._guards(method), dict[int, Trace]()
        limiter = anyio.CapacityLimiter(NEIGHBOURS)

        async def one(index: int, prompt: Prompt) -> None:
            async with limiter:
                traces[index] = (await guard.answer(prompt.messages, self._sampling)).trace

        async with anyio.create_task_group() as group:
            for index, prompt in enumerate(self._prompts):
                group.start_soon(one, index, prompt)
        for trace in traces.values():
            if trace.stop_reason.startswith("moderator:"):
                raise ModerationUnavailableError(f"an answer could not be scored ({trace.stop_reason})")
        return [traces[index] for index in range(len(self._prompts))]


def front(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that none other beats in neutralised share and in closeness, the safest first."""
    kept = [trial for trial in trials if not any(_beats(other, trial) for other in trials)]
    return sorted(kept, key=lambda trial: (-trial.share, trial.move, trial.tokens))


def winner(trials: Sequence[Trial]) -> Trial:
    """The trial that neutralised most; of those the one with the smallest move, then with the fewest tokens."""
    return min(trials, key=lambda trial: (-trial.share, trial.move, trial.tokens))


def _beats(a: Trial, b: Trial) -> bool:
    return a.share >= b.share and a.move <= b.move and (a.share, a.move) != (b.share, b.move)


def _trial(frozen: Any) -> Trial:
    attributes = frozen.user_attrs
    return Trial(
        number=frozen.number,
        settings=attributes["settings"],
        prompts=attributes["prompts"],
        neutralised=attributes["neutralised"],
        move=frozen.values[1],
        tokens=attributes["tokens"],
    )
