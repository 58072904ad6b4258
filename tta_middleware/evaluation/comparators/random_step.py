"""The control of the paper's gradient: steps of the same size in random directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt

from tta_middleware.config import Settings
from tta_middleware.methods.base import Needs, OpenProposals, Start
from tta_middleware.methods.geometry import (
    Rows,
    StepNorm,
    gaussian,
    mean_row_norm,
    movable,
    project_to_cone,
    unit_step,
)
from tta_middleware.types import PromptEmbeddings, Proposal


class RandomStep(Settings):
    """Algorithm 1 of arXiv 2604.26167 without its probes: X_{k+1} = X_k - eta u with a random unit direction u.

    Settings as in :class:`~tta_middleware.methods.TSA` with ``units="token_norm"``. It counts one generation a step
    where ``tsa`` takes N + 1. If ``tsa`` does no better per step, its gradient carries no information; if it does no
    better per token, the gradient is not worth its price.
    """

    name: ClassVar[str] = "random-step"
    needs: ClassVar[Needs] = Needs(margin=False)

    steps: PositiveInt = 10
    eta: PositiveFloat = 0.5
    kappa: Annotated[float, Field(ge=-1.0, le=1.0)] = 0.2
    step_norm: StepNorm = "token"
    rows: Rows = "user"

    def build(self, start: Start) -> RandomStepOptimiser:
        return RandomStepOptimiser(self, start.prompt, start.loss, start.rng)


class RandomStepOptimiser:
    """One base point at a time, until one is safe (usable or not, as in the paper) or the steps are used up."""

    name = "random-step"

    def __init__(self, settings: RandomStep, prompt: PromptEmbeddings, loss: float, rng: np.random.Generator) -> None:
        self._settings, self._rng = settings, rng
        self._matrix = prompt.matrix
        self._mask = movable(prompt, settings.rows)
        self._origin = prompt.matrix[self._mask]
        self._point = self._origin.copy()
        whole = settings.step_norm == "matrix"
        self._eta = settings.eta * (float(np.linalg.norm(self._origin)) if whole else mean_row_norm(self._origin))
        self._loss = loss
        self._seen = 1
        self._open = OpenProposals()

    def ask(self, limit: int) -> list[Proposal]:
        if limit < 1 or self.stop() or len(self._open):
            return []
        step = self._eta * unit_step(gaussian(self._rng, self._origin.shape), self._settings.step_norm)
        self._point = project_to_cone(self._point - step, self._origin, self._settings.kappa)
        matrix = self._matrix.copy()
        matrix[self._mask] = self._point
        return [self._open.add(Proposal(matrix, whole=True, label=self.name), 0)]

    def tell(self, proposals: Sequence[Proposal], losses: Sequence[float]) -> None:
        for _, loss in self._open.resolve(proposals, losses):
            self._loss = loss
            self._seen += 1

    def stop(self) -> tuple[str, ...]:
        if self._loss < 0.0:
            return ("base point under the threshold",)
        if self._seen >= self._settings.steps:
            return (f"{self._settings.steps} steps",)
        return () if len(self._origin) else ("no movable tokens",)
