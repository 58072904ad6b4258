"""Best-of-N sampling against the moderator (Nakano et al. 2021, arXiv 2112.09332, with the oracle as the reward)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tta_middleware.evaluation.comparators.base import Bench
from tta_middleware.evaluation.comparators.workbench import Workbench
from tta_middleware.guard import Report
from tta_middleware.types import Message, Proposal, Sampling, Trace


@dataclass(frozen=True, slots=True)
class BestOfN:
    """N whole answers at ``temperature``; the one with the lowest moderation score is the answer, usable or not.

    Counts N generations, all their tokens, and N moderation calls. N is the paper's number of probes
    per step, so that one round costs what one step of ``tsa`` does.
    """

    name: str = "best-of-n"
    count: int = 8
    temperature: float = 1.0

    @property
    def settings(self) -> str:
        return repr(self)

    def iterations(self, trace: Trace) -> float:
        return len(trace.steps)

    async def run(self, bench: Bench, messages: Sequence[Message], sampling: Sampling) -> Report:
        work = await Workbench.open(self.name, bench, messages, sampling)
        if not work.flagged:
            return work.start
        proposal = Proposal(work.prompt.matrix, temperature=self.temperature, whole=True, label=self.name)
        found = await work.answers([proposal] * self.count)
        return await work.report(min(found, key=lambda candidate: candidate.verdict.score, default=None))
