"""Runs every method on every prompt, under every seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import anyio

from tta_middleware.aio.streams import first_error
from tta_middleware.errors import EngineError, ModerationError, ModerationUnavailableError
from tta_middleware.evaluation.comparators import Bench, Comparator
from tta_middleware.evaluation.first import SharedFirst, decode_together
from tta_middleware.evaluation.judges import Reviewer
from tta_middleware.evaluation.measures import Closeness, Measured, measure
from tta_middleware.evaluation.records import Setting, candidates, to_record
from tta_middleware.evaluation.run_folder import RunFolder
from tta_middleware.files.jsonl import Record
from tta_middleware.files.prompts import Prompt
from tta_middleware.guard.context import last_user_text
from tta_middleware.guard.settings import Report
from tta_middleware.moderation.cache import Cached
from tta_middleware.protocols import Engine
from tta_middleware.trace import no_verdict, not_checked
from tta_middleware.types import Sampling

GROUP = 16
"""First answers that are decoded side by side where prompts are run side by side."""

Pair: TypeAlias = tuple[int, Comparator]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run, apart from the prompts.

    Attributes:
        seeds: every method is run once under each; a greedy first answer is the same under all.
        concurrency: runs at work at once, of one prompt by one method each. Their decodes share the engine's batch, so
            more are done in the same time, and the seconds of one no longer say what it would take alone. Above 1 a
            text that was scored is not scored again, which every run counts all the same.
        neighbours: all prompts of the files that the run's prompts are from, so that groups of first answers are the
            same whatever part of a file is run; the run's own prompts where it is empty.
    """

    bench: Bench
    comparators: Sequence[Comparator]
    sampling: Sampling
    judges: Mapping[str, Reviewer] = field(default_factory=dict)
    keep_text: bool = False
    relevance: Closeness | None = None
    seeds: Sequence[int] = (0,)
    concurrency: int = 1
    neighbours: Sequence[Prompt] = ()


def open_work(
    prompts: Sequence[Prompt], seeds: Sequence[int], chosen: Sequence[Comparator], store: RunFolder
) -> list[tuple[Prompt, list[Pair]]]:
    """What has no result yet, prompt by prompt, so that a run that is cut off can still be compared."""
    finished = store.finished
    work = []
    for prompt in prompts:
        pairs = [(s, c) for s in seeds for c in chosen if (str(prompt.id), s, c.name) not in finished]
        if pairs:
            work.append((prompt, pairs))
    return work


async def evaluate(
    prompts: Sequence[Prompt], plan: Plan, store: RunFolder, on_record: Callable[[Record], None] = lambda _: None
) -> None:
    """Run what is open; each result is kept at once.

    Raises:
        EngineError: the model failed.
        ModerationError: an answer could not be scored. Results so far are kept.
    """

    def keep(record: Record) -> None:
        store.append(record)
        on_record(record)

    work = open_work(prompts, plan.seeds, plan.comparators, store)
    if plan.concurrency == 1:
        await _work(_runs(work, plan, {}), plan, keep)
        return
    ready = await _first_answers({str(prompt.id) for prompt, _ in work}, plan, prompts)
    plan = replace(plan, bench=replace(plan.bench, moderator=Cached(plan.bench.moderator)))
    queue = _runs(work, plan, ready)
    try:
        async with anyio.create_task_group() as group:
            for _ in range(plan.concurrency):
                group.start_soon(_work, queue, plan, keep)
    except BaseExceptionGroup as errors:
        raise first_error(errors) from None


async def _first_answers(wanted: set[str], plan: Plan, prompts: Sequence[Prompt]) -> dict[str, SharedFirst]:
    """By prompt id; whole groups are decoded, also where only one of a group is wanted."""
    everything = plan.neighbours or prompts
    groups = [everything[at : at + GROUP] for at in range(0, len(everything), GROUP)]
    ready: dict[str, SharedFirst] = {}
    for group in groups:
        if wanted.isdisjoint(str(prompt.id) for prompt in group):
            continue
        engines = [SharedFirst(plan.bench.engine) for _ in group]
        for seed in plan.seeds if plan.sampling.temperature > 0 else (0,):
            samplings = [_sampling(plan, seed, prompt) for prompt in group]
            await decode_together(engines, [prompt.messages for prompt in group], samplings)
        ready |= {str(prompt.id): engine for prompt, engine in zip(group, engines, strict=True)}
    return ready


@dataclass(frozen=True, slots=True)
class _Shared:
    """What the methods have in common on one prompt: the first answer, and what was measured of equal texts."""

    engine: SharedFirst
    measured: dict[str, Measured] = field(default_factory=dict)


_Run: TypeAlias = tuple[Prompt, int, Comparator, _Shared]


def _runs(work: Sequence[tuple[Prompt, list[Pair]]], plan: Plan, ready: Mapping[str, SharedFirst]) -> Iterator[_Run]:
    """Prompt by prompt, so that a run that is cut off can still be compared."""
    for prompt, pairs in work:
        shared = _Shared(ready.get(str(prompt.id)) or SharedFirst(plan.bench.engine))
        for seed, comparator in pairs:
            yield prompt, seed, comparator, shared


async def _work(queue: Iterator[_Run], plan: Plan, keep: Callable[[Record], None]) -> None:
    for prompt, seed, comparator, shared in queue:
        keep(await _one(prompt, seed, comparator, plan, shared))


async def _one(prompt: Prompt, seed: int, comparator: Comparator, plan: Plan, common: _Shared) -> Record:
    engine = common.engine
    sampling = _sampling(plan, seed, prompt)
    try:
        unguarded = await engine.prepare(prompt.messages, sampling)
        seconds = engine.seconds
        # Where answers are decoded alone, the guard does so itself on benign prompts: that its answer is the unguarded
        # one is what is measured there.
        shared = not (prompt.benign and plan.concurrency == 1)
        chosen: Engine = engine if shared else plan.bench.engine
        bench = replace(plan.bench, engine=chosen, seed=sampling.seed)
        report = await comparator.run(bench, prompt.messages, sampling)
        measured = await _measured(prompt, report, plan, common.measured)
    except EngineError as error:
        raise EngineError(
            f"prompt {prompt.id!r}, method {comparator.name}: {error}; results so far are kept"
        ) from error
    except ModerationError as error:
        raise _down(plan, prompt, no_verdict(error)) from error
    reason = report.answer.trace.stop_reason
    if not_checked(reason):
        raise _down(plan, prompt, reason)
    setting = Setting(seed, comparator.name, plan.concurrency, seconds if shared else 0.0)
    iterations = comparator.iterations(report.answer.trace)
    return to_record(
        prompt,
        setting,
        report,
        measured,
        iterations=iterations,
        unguarded=None if shared else unguarded.text,
        keep_text=plan.keep_text,
    )


def _sampling(plan: Plan, seed: int, prompt: Prompt) -> Sampling:
    return replace(plan.sampling, seed=seed).apart(str(prompt.id))


def _down(plan: Plan, prompt: Prompt, reason: str) -> ModerationUnavailableError:
    return ModerationUnavailableError(
        f"{plan.bench.moderator.name!r} could not score an answer to prompt {prompt.id!r} ({reason}); "
        "results so far are kept: run the same command again to go on"
    )


async def _measured(prompt: Prompt, report: Report, plan: Plan, known: dict[str, Measured]) -> list[Measured]:
    first, last = candidates(report)
    if first is None or last is None:
        return [Measured(refusal=False)] * 2
    texts = [first.completion.text, last.completion.text]
    new = [text for text in dict.fromkeys(texts) if text not in known]
    if new:
        found = await measure(new, last_user_text(prompt.messages), judges=plan.judges, relevance=plan.relevance)
        known |= dict(zip(new, found, strict=True))
    return [known[text] for text in texts]
