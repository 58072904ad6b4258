"""Best-of-N sampling against the moderator (Nakano et al. 2021, arXiv 2112.09332, with the oracle as the reward)."""

from __future__ import annotations

from dataclasses import dataclass

from tta_middleware.evaluation.comparators.rework import Rework
from tta_middleware.evaluation.comparators.workbench import Workbench
from tta_middleware.guard.settings import Report
from tta_middleware.types import Proposal


@dataclass(frozen=True, slots=True)
class BestOfN(Rework):
    """N whole answers at ``temperature``; the one with the lowest moderation score is the answer, usable or not.

    Counts N generations, all their tokens, and N moderation calls. N is the paper's number of probes
    per step, so that one round costs what one step of ``tsa`` does.
    """

    name: str = "best-of-n"
    count: int = 8
    temperature: float = 1.0

    async def rework(self, work: Workbench) -> Report:
        proposal = Proposal(work.prompt.matrix, temperature=self.temperature, whole=True, label=self.name)
        found = await work.answers([proposal] * self.count)
        return await work.report(min(found, key=lambda candidate: candidate.verdict.score, default=None))
