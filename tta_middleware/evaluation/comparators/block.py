"""Block-and-refuse: what a moderation filter without repair does."""

from __future__ import annotations

from dataclasses import dataclass

from tta_middleware.evaluation.comparators.rework import Rework
from tta_middleware.evaluation.comparators.workbench import Workbench
from tta_middleware.guard.settings import Report
from tta_middleware.types import Trace


@dataclass(frozen=True, slots=True)
class Block(Rework):
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

    async def rework(self, work: Workbench) -> Report:
        notice = work.policy.notice
        whole = await work.context.embed(notice)
        return await work.report(await work.score(notice, whole.token_ids[len(work.prompt.token_ids) :].tolist()))
