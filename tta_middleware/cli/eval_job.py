"""Wires an evaluation: reads, opens, runs, sums up."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio

from tta_middleware.assembly import Loading, opened
from tta_middleware.batch.progress import progress, resumable
from tta_middleware.batch.standard import emit, note
from tta_middleware.cli.eval_output import check_extra, write
from tta_middleware.cli.output import loaded, say
from tta_middleware.config import Budget
from tta_middleware.errors import ConfigurationError
from tta_middleware.evaluation.comparators import Bench, Comparator, comparators
from tta_middleware.evaluation.environment import environment
from tta_middleware.evaluation.jailbreaks import wrapped_in
from tta_middleware.evaluation.judges import Reviewer, resolve_judge
from tta_middleware.evaluation.judging import judge_again
from tta_middleware.evaluation.measures import Closeness
from tta_middleware.evaluation.run_folder import PROMPTS, RunFolder
from tta_middleware.evaluation.runner import GROUP, Plan, evaluate, open_work
from tta_middleware.evaluation.shown import shown_command, shown_path
from tta_middleware.evaluation.summary import summarise
from tta_middleware.evaluation.tables import to_markdown
from tta_middleware.files.jsonl import Record
from tta_middleware.files.prompts import Prompt, read_sets
from tta_middleware.policy import Policy, StagePolicies
from tta_middleware.profiles.fingerprint import model_hash
from tta_middleware.profiles.store import judge_calibration, load_profile, quality_for
from tta_middleware.registry import asks_own, check_policies, judging_model, moderators_in, resolve_moderator
from tta_middleware.types import Sampling


@dataclass(frozen=True, slots=True)
class Scope:
    """What is run: prompts, what wraps them, seeds, and how many prompts at once."""

    prompts: Sequence[Path]
    limit: int | None
    benign_only: bool
    jailbreak: str | None
    seeds: tuple[int, ...]
    concurrency: int

    def read(self) -> list[Prompt]:
        """The prompts.

        Raises:
            DataError: a line cannot be used.
            ConfigurationError: a file cannot be read, or nothing in it is wanted.
        """
        return self._wrapped(self._chosen())

    def everything(self) -> list[Prompt]:
        """All prompts of the files, whatever is run of them.

        Raises:
            DataError: a line cannot be used.
            ConfigurationError: a file cannot be read.
        """
        return self._wrapped(read_sets(self.prompts))

    def _wrapped(self, prompts: list[Prompt]) -> list[Prompt]:
        if self.jailbreak is None:
            return prompts
        return [replace(prompt, messages=wrapped_in(self.jailbreak, prompt.messages)) for prompt in prompts]

    def _chosen(self) -> list[Prompt]:
        prompts = read_sets(self.prompts, None if self.benign_only else self.limit)
        if not self.benign_only:
            return prompts
        benign = [prompt for prompt in prompts if prompt.benign][: self.limit]
        if not benign:
            raise ConfigurationError(
                "no prompt is marked benign; each line needs 'benign': true, or leave --benign-only"
            )
        return benign


@dataclass(frozen=True, slots=True)
class EvaluationOutput:
    """What is written, and how much of it."""

    folder: Path
    report: Path | None
    examples: int
    reference: str | None
    keep_text: bool
    as_json: bool

    @property
    def detailed(self) -> bool:
        """Whether intervals are wanted, which need the extra."""
        return self.report is not None or self.reference is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRequest:
    """What was asked for."""

    scope: Scope
    methods: str
    variants: tuple[str, ...]
    loading: Loading
    moderator: str
    judges: tuple[str, ...]
    relevance: bool
    policy: Policy
    sampling: Sampling
    budget: Budget
    output: EvaluationOutput
    command: str

    @property
    def judge_names(self) -> list[str]:
        """The judges as results and reports name them, without the folders of models."""
        return [shown_path(name) for name in self.judges]

    def with_threshold(self) -> EvaluationRequest:
        """The threshold that will be used, so that it is on record."""
        check_policies(self.moderator, StagePolicies.of(self.policy))
        moderator = resolve_moderator(self.moderator, engine=self.loading.engine())
        return replace(self, policy=self.policy.with_default(moderator.default_threshold))

    def settings(self) -> dict[str, Any]:
        """What a run must share with the run that it goes on with."""
        return {
            PROMPTS: [hashlib.sha256(path.read_bytes()).hexdigest() for path in self.scope.prompts],
            "jailbreak": self.scope.jailbreak,
            "model": self.loading.model,
            **self.loading.hardware,
            "moderator": self.moderator,
            "relevance": self.relevance,
            "policy": self.policy.model_dump(mode="json"),
            "max_new_tokens": self.sampling.max_new_tokens,
            "temperature": self.sampling.temperature,
            "chance": "by prompt",
            "first_answers": "alone" if self.scope.concurrency == 1 else f"in groups of {GROUP}",
            "budget": self.budget.model_dump(mode="json"),
            "keep_text": self.output.keep_text,
        }

    def description(self, store: RunFolder) -> dict[str, Any]:
        """What a reader of the table must know."""
        return {
            "command": shown_command(self.command),
            "commands": [shown_command(command) for command in store.commands],
            "prompts": " and ".join(path.name for path in self.scope.prompts),
            **({"jailbreak": self.scope.jailbreak} if self.scope.jailbreak else {}),
            "model": shown_path(self.loading.model),
            **self.loading.hardware,
            "moderator": "+".join(map(shown_path, self.moderator.split("+"))),
            **({"judges": ", ".join(self.judge_names)} if self.judges else {}),
            **{f"{shown_path(name)} fitted on": sources for name in self.judges if (sources := _fitted_on(name))},
            "threshold": self.policy.threshold,
            "seeds": _joined(record["seed"] for record in store.records),
            "concurrency": _joined(record["concurrency"] for record in store.records),
            "max_new_tokens": self.sampling.max_new_tokens,
            "temperature": self.sampling.temperature,
            "generations at most": self.budget.generations,
            "versions": environment(),
        }


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds from what was typed.

    Raises:
        ConfigurationError: none, one that is no whole number from 0, or one that comes twice.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isascii() and word.isdigit() for word in words):
        raise ConfigurationError(f"--seeds takes whole numbers from 0 with commas between them, not {text!r}")
    seeds = tuple(map(int, words))
    if len(set(seeds)) < len(seeds):
        raise ConfigurationError(f"--seeds names a seed twice: {text}")
    return seeds


def run_eval(request: EvaluationRequest) -> None:
    """Run what is open of ``request``, then write and print the summary."""
    chosen, output = comparators(request.methods, request.variants), request.output
    prompts = request.scope.read()
    judges = _judges(request)
    check_extra(detailed=output.detailed)
    request = request.with_threshold()
    methods = {comparator.name: comparator.settings for comparator in chosen}
    with (
        resumable(),
        RunFolder(output.folder, request.settings(), methods, request.command, request.judge_names) as store,
    ):
        _check_reference(output.reference, chosen, store)
        anyio.run(partial(_run, request, prompts, chosen, judges, store))
        records = _in_order(store.records, prompts, store.methods)
        run = request.description(store)
        summary = summarise(records, run, intervals=output.detailed, reference=output.reference)
        table = to_markdown(summary)
        store.write_summary(summary, table)
        if output.report is not None:
            write(output.report, summary, table, records, examples=output.examples)
    emit(summary) if output.as_json else say(table)
    note(f"results: {store.results}")


def _judges(request: EvaluationRequest) -> dict[str, Reviewer]:
    """Further judges by name, of which the search must see none, by whatever name.

    Raises:
        ConfigurationError: one is unknown, comes twice, or the search sees it.
    """
    found = {shown: _judge(name, request) for shown, name in zip(request.judge_names, request.judges, strict=True)}
    if len(found) < len(request.judges):
        raise ConfigurationError(f"--judge names a judge twice: {', '.join(request.judge_names)}")
    return found


def _judge(name: str, request: EvaluationRequest) -> Reviewer:
    asked = moderators_in(request.moderator)
    seen = {model_hash(model) for name in asked if (model := judging_model(name)) is not None}
    seen |= {model_hash(request.loading.model)} if asks_own(request.moderator) else set()
    model = judging_model(name)
    if model is not None and model_hash(model) in seen:
        raise ConfigurationError(
            f"the judge must not be the moderator that the search sees ({name} is the model that "
            f"{request.moderator} asks); choose another"
        )
    return resolve_judge(name, moderator=request.moderator, calibration=judge_calibration)


def _fitted_on(judge: str) -> str:
    """The sources that a judging model's calibration saw; empty where none did."""
    model = judging_model(judge)
    profile = load_profile(model_hash(model)) if model is not None else None
    return ", ".join(profile.judging.sources) if profile and profile.judging else ""


def _check_reference(reference: str | None, chosen: Sequence[Comparator], store: RunFolder) -> None:
    """Tell before the work, not after it."""
    there = dict.fromkeys([*(comparator.name for comparator in chosen), *(r["method"] for r in store.records)])
    if reference is not None and reference not in there:
        raise ConfigurationError(f"no results of the reference {reference!r}; there are {', '.join(there)}")


def _in_order(records: Sequence[Record], prompts: Sequence[Prompt], methods: Sequence[str]) -> list[Record]:
    """By method as they were asked for, then by prompt, whatever the order in which they were done side by side; those
    of prompts that were not asked for now come last.
    """
    place = {str(prompt.id): at for at, prompt in enumerate(prompts)}
    turn = {name: at for at, name in enumerate(methods)}
    return sorted(records, key=lambda one: (turn.get(one["method"], len(turn)), place.get(str(one["id"]), len(place))))


async def _run(
    request: EvaluationRequest,
    prompts: list[Prompt],
    chosen: list[Comparator],
    judges: Mapping[str, Reviewer],
    store: RunFolder,
) -> None:
    seeds = request.scope.seeds
    try:
        if judged := await judge_again(store, judges, request.scope.everything() if store.records else ()):
            note(f"{judged} results were judged again")
        left = sum(len(pairs) for _, pairs in open_work(prompts, seeds, chosen, store))
        total = len(prompts) * len(chosen) * len(seeds)
        if left < total:
            note(f"{total - left} of {total} results are there already")
        if left == 0:
            return
        async with _plan(request, chosen, judges) as plan:
            with progress("eval", total - left, total) as advance:
                await evaluate(prompts, plan, store, lambda record: advance(_word(record)))
    finally:
        with anyio.CancelScope(shield=True):
            for judge in judges.values():
                await judge.aclose()


@asynccontextmanager
async def _plan(
    request: EvaluationRequest, chosen: list[Comparator], judges: Mapping[str, Reviewer]
) -> AsyncIterator[Plan]:
    relevance = _relevance(request)
    async with opened(request.loading, request.moderator, loaded=loaded) as (engine, moderator):
        bench = Bench(engine, moderator, request.policy, request.budget, quality=quality_for(request.loading.model))
        yield Plan(
            bench,
            chosen,
            request.sampling,
            judges,
            request.output.keep_text,
            relevance,
            request.scope.seeds,
            request.scope.concurrency,
            request.scope.everything() if request.scope.concurrency > 1 else (),
        )


def _relevance(request: EvaluationRequest) -> Closeness | None:
    if not request.relevance:
        return None
    from tta_middleware.evaluation.relevance import Relevance

    return Relevance()


def _joined(values: Any) -> str:
    return " ".join(map(str, sorted(set(values))))


def _word(record: Record) -> str:
    outcome = {True: "neutralised", False: "still flagged or not usable", None: "not flagged"}[record["neutralised"]]
    return f"{record['method']} {record['id']}: {outcome}"
