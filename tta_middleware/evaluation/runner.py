"""Runs every method on every prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tta_middleware.errors import EngineError, ModerationUnavailableError
from tta_middleware.evaluation.datasets import Prompt
from tta_middleware.evaluation.jsonl import Record
from tta_middleware.evaluation.judges import Opinion, Reviewer
from tta_middleware.evaluation.methods import Bench, Comparator
from tta_middleware.evaluation.records import candidates, to_record
from tta_middleware.evaluation.store import RunFolder
from tta_middleware.guard import Report, last_user_text
from tta_middleware.types import Sampling


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run, apart from the prompts."""

    bench: Bench
    comparators: Sequence[Comparator]
    sampling: Sampling
    judge: Reviewer | None = None
    keep_text: bool = False


def open_pairs(prompts: Sequence[Prompt], plan: Plan, store: RunFolder) -> list[tuple[Prompt, Comparator]]:
    """The pairs without a result, prompt by prompt, so that a run that is cut off can still be compared."""
    finished = store.finished
    return [(p, c) for p in prompts for c in plan.comparators if (str(p.id), c.name) not in finished]


async def evaluate(
    prompts: Sequence[Prompt], plan: Plan, store: RunFolder, on_record: Callable[[Record], None] = lambda _: None
) -> None:
    """Run what is open, one answer after the other, so that seconds can be compared; each result is kept at once.

    Raises:
        EngineError: the model failed.
        ModerationError: an answer could not be scored. Results so far are kept.
    """
    for prompt, comparator in open_pairs(prompts, plan, store):
        record = await _one(prompt, comparator, plan)
        store.append(record)
        on_record(record)


async def _one(prompt: Prompt, comparator: Comparator, plan: Plan) -> Record:
    try:
        report = await comparator.run(plan.bench, prompt.messages, plan.sampling)
    except EngineError as error:
        raise EngineError(
            f"prompt {prompt.id!r}, method {comparator.name}: {error}; results so far are kept"
        ) from error
    reason = report.answer.trace.stop_reason
    if reason.startswith("moderator:"):
        raise ModerationUnavailableError(
            f"{plan.bench.moderator.name!r} could not score an answer to prompt {prompt.id!r} ({reason}); "
            "results so far are kept: run the same command again to go on"
        )
    judged = await _judged(prompt, report, plan.judge)
    return to_record(prompt.id, comparator.name, report, keep_text=plan.keep_text, judged=judged)


async def _judged(prompt: Prompt, report: Report, judge: Reviewer | None) -> list[Opinion]:
    first, last = candidates(report)
    if judge is None or first is None or last is None:
        return []
    return await judge.review([first.completion.text, last.completion.text], last_user_text(prompt.messages))
