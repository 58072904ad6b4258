"""Wires an evaluation: reads, opens, runs, sums up."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio

from tta_middleware.cli.output import emit, note, say
from tta_middleware.cli.parts import opened
from tta_middleware.cli.progress import progress, resumable
from tta_middleware.config import Budget
from tta_middleware.evaluation.datasets import Prompt, read_prompts
from tta_middleware.evaluation.environment import environment
from tta_middleware.evaluation.jsonl import Record
from tta_middleware.evaluation.judges import Reviewer, resolve_judge
from tta_middleware.evaluation.methods import Bench, Comparator, comparators
from tta_middleware.evaluation.runner import Plan, evaluate, open_pairs
from tta_middleware.evaluation.store import RunFolder
from tta_middleware.evaluation.summary import summarise, to_markdown
from tta_middleware.policy import Policy
from tta_middleware.registry import resolve_moderator
from tta_middleware.types import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked for."""

    prompts: Path
    out: Path
    methods: str
    model: str
    moderator: str
    judge: str | None
    limit: int | None
    policy: Policy
    sampling: Sampling
    budget: Budget
    keep_text: bool
    allow_download: bool
    command: str

    def with_threshold(self) -> Request:
        """The threshold that will be used, so that it is on record."""
        moderator = resolve_moderator(self.moderator)
        return replace(self, policy=self.policy.with_default(moderator.default_threshold))

    def settings(self) -> dict[str, Any]:
        """What a run must share with the run that it goes on with."""
        return {
            "prompts_sha256": hashlib.sha256(self.prompts.read_bytes()).hexdigest(),
            "model": self.model,
            "moderator": self.moderator,
            "judge": self.judge,
            "policy": self.policy.model_dump(mode="json"),
            "seed": self.sampling.seed,
            "max_new_tokens": self.sampling.max_new_tokens,
            "temperature": self.sampling.temperature,
            "budget": self.budget.model_dump(mode="json"),
            "keep_text": self.keep_text,
        }

    def description(self) -> dict[str, Any]:
        """What a reader of the table must know."""
        return {
            "command": self.command,
            "model": self.model,
            "moderator": self.moderator,
            **({"judge": self.judge} if self.judge else {}),
            "threshold": self.policy.threshold,
            "seed": self.sampling.seed,
            "max_new_tokens": self.sampling.max_new_tokens,
            "temperature": self.sampling.temperature,
            "generations at most": self.budget.generations,
            "versions": environment(),
        }


def run_eval(request: Request, *, as_json: bool) -> None:
    """Run what is open of ``request``, then write and print the summary."""
    chosen = comparators(request.methods)
    prompts = read_prompts(request.prompts, request.limit)
    judge = resolve_judge(request.judge, moderator=request.moderator) if request.judge else None
    request = request.with_threshold()
    with resumable(), RunFolder(request.out, request.settings(), {c.name: c.settings for c in chosen}) as store:
        anyio.run(partial(_run, request, prompts, chosen, judge, store))
        summary = summarise(store.records, request.description())
        table = to_markdown(summary)
        store.write_summary(summary, table)
    emit(summary) if as_json else say(table)
    note(f"results: {store.results}")


async def _run(
    request: Request, prompts: list[Prompt], chosen: list[Comparator], judge: Reviewer | None, store: RunFolder
) -> None:
    async with _plan(request, chosen, judge) as plan:
        left = len(open_pairs(prompts, plan, store))
        total = len(prompts) * len(chosen)
        if left < total:
            note(f"{total - left} of {total} results are there already")
        with progress("eval", total - left, total) as advance:
            await evaluate(prompts, plan, store, lambda record: advance(_word(record)))


@asynccontextmanager
async def _plan(request: Request, chosen: list[Comparator], judge: Reviewer | None) -> AsyncIterator[Plan]:
    async with opened(request.model, request.moderator, allow_download=request.allow_download) as (engine, moderator):
        try:
            bench = Bench(engine, moderator, request.policy, request.budget, request.sampling.seed)
            yield Plan(bench, chosen, request.sampling, judge, request.keep_text)
        finally:
            if judge is not None:
                with anyio.CancelScope(shield=True):
                    await judge.aclose()


def _word(record: Record) -> str:
    outcome = {True: "neutralised", False: "still flagged or not usable", None: "not flagged"}[record["neutralised"]]
    return f"{record['method']} {record['id']}: {outcome}"
