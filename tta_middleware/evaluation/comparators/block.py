"""Block-and-refuse: what a moderation filter without repair does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tta_middleware.evaluation.comparators.base import Bench
from tta_middleware.evaluation.comparators.workbench import Workbench
from tta_middleware.guard import Report
from tta_middleware.types import Message, Sampling, Trace


@dataclass(frozen=True, slots=True)
class Block:
    """The policy's notice instead of a flagged answer.

    Counts nothing beyond the undefended answer: the notice is the operator's own text, so it is neither decoded nor
    sent to the moderator in production. Here it is scored and judged like any answer, for the record. It is the
    ceiling of safety and the floor of helpfulness that every repair lies between.
    """

    name: str = "block"

    @property
    def settings(self) -> str:
        return "block"

    def iterations(self, trace: Trace) -> float:
        return 0.0

    async def run(self, bench: Bench, messages: Sequence[Message], sampling: Sampling) -> Report:
        work = await Workbench.open(self.name, bench, messages, sampling)
        if not work.flagged:
            return work.start
        notice = work.policy.notice
        whole = await bench.engine.embed(messages, assistant_prefix=notice)
        return await work.report(await work.score(notice, whole.token_ids[len(work.prompt.token_ids) :].tolist()))
