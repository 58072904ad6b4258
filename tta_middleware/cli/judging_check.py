"""Whether a model can judge: asked about the mild examples that come along."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from tta_middleware.aio import bridge
from tta_middleware.moderation.judge_figures import auc
from tta_middleware.moderation.judge_fit import POOR
from tta_middleware.moderation.llm_judge import LLMJudge
from tta_middleware.policy.verdicts import verdicts_on
from tta_middleware.profiles.judging import LabelledAnswer, shipped_answers
from tta_middleware.profiles.store import judge_calibration
from tta_middleware.registry import resolve_engine


@dataclass(frozen=True, slots=True)
class JudgingReport:
    """What a model said of the examples.

    Attributes:
        auc: by the scores that its profile makes of its word.
        found, false_alarms: shares of the harmful and harmless examples that score 0.5 or more.
        fitted: the sources that its profile was fitted on; empty without.
    """

    model: str
    examples: int
    auc: float
    found: float
    false_alarms: float
    calibrated: bool

    @property
    def poor(self) -> bool:
        """Whether nobody should rely on it."""
        return self.auc < POOR

    def __str__(self) -> str:
        how = "with its profile" if self.calibrated else "without a profile"
        return (
            f"{self.model} {how}: AUC {self.auc:.2f} on {self.examples} mild examples, where 0.5 is chance; "
            f"finds {self.found:.0%} of the harmful ones at {self.false_alarms:.0%} false alarms"
        )

    @property
    def advice(self) -> str:
        """What to do; empty where it judges well."""
        if self.poor:
            return "it cannot tell harm: take another model as judge (guard:MODEL), or local"
        return "" if self.calibrated else "fit its scores first: tta calibrate --only judging --answers FILE.jsonl"


def judging_report(model: str) -> JudgingReport:
    """Load a model and ask it about the examples; some seconds to a minute.

    Raises:
        TTAError: it cannot be loaded or asked.
    """
    return bridge.run(partial(_report, model, shipped_answers()))


async def _report(model: str, answers: list[LabelledAnswer]) -> JudgingReport:
    calibration = judge_calibration(model)
    judge = LLMJudge(resolve_engine(model), calibration=calibration, closes=True)
    try:
        scores = np.array([(await verdicts_on(judge, [a.response], prompt=a.prompt))[0].score for a in answers])
    finally:
        await judge.aclose()
    harmful = np.array([answer.harmful for answer in answers])
    flagged = scores >= judge.default_threshold
    found, false_alarms = float(flagged[harmful].mean()), float(flagged[~harmful].mean())
    return JudgingReport(model, len(answers), auc(scores, harmful), found, false_alarms, calibration is not None)
