"""Test-Time Safety Alignment by zeroth-order descent (arXiv 2604.26167, Algorithm 1)."""

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
    Units,
    gaussian,
    mean_row_norm,
    movable,
    project_to_cone,
    unit_step,
)
from tta_middleware.types import FloatMatrix, PromptEmbeddings, Proposal

_BASE = -1
"""Index of a base point among open proposals; probes count from 0."""


class TSA(Settings):
    """Settings of the paper's method, which stops at the policy's own threshold: no margin, unless a policy names one.

    Attributes:
        probes: N, perturbed answers per step.
        steps: K, base points evaluated, the first answer included.
        mu: length of a probe's perturbation, and ``eta``: length of a step. With ``units="token_norm"`` both are
            shares of the movable rows' mean norm (per row) or of their Frobenius norm (``step_norm="matrix"``,
            eta only), which transfers between models; with ``"absolute"`` mu is the standard deviation per
            entry and eta the step in embedding units, as the paper's per-model figures are.
        kappa: least cosine with the original rows, all movable rows taken as one vector.
        step_norm: ``token`` normalises each row of the gradient, as the authors' code does; ``matrix`` the
            whole, as the paper writes.
        rows: ``user`` moves the content of the last user turn, ``all`` the template's tokens, too.
    """

    name: ClassVar[str] = "tsa"
    needs: ClassVar[Needs] = Needs(margin=False)

    probes: PositiveInt = 8
    steps: PositiveInt = 10
    mu: PositiveFloat = 0.1
    eta: PositiveFloat = 0.5
    kappa: Annotated[float, Field(ge=-1.0, le=1.0)] = 0.2
    step_norm: StepNorm = "token"
    rows: Rows = "user"
    units: Units = "token_norm"

    def build(self, start: Start) -> TSAOptimiser:
        return TSAOptimiser(self, start.prompt, start.loss if start.whole else None, start.rng)


class TSAOptimiser:
    """Algorithm 1 as ask/tell: N probes around X_k, one step against the gradient, then X_{k+1} itself.

    Only base points are releasable, as in the paper; the probes feed the gradient. The search ends by its own
    rule when a base point is safe, usable or not, or after K base points.

    Probes are scored whole. Where the first answer was not (a stream drops it at the first flagged window: ``loss`` is
    None), X_0 itself is asked first, or all slopes would be off by one number and the first gradient by a random
    direction.
    """

    name = "tsa"

    def __init__(self, settings: TSA, prompt: PromptEmbeddings, loss: float | None, rng: np.random.Generator) -> None:
        self._settings = settings
        self._rng = rng
        self._matrix = prompt.matrix
        self._mask = movable(prompt, settings.rows)
        self._origin = prompt.matrix[self._mask]
        self._point = self._origin.copy()
        self._open = OpenProposals()
        self._base_loss = np.inf if loss is None else loss
        self._base_due = loss is None
        self._points_seen = 0 if loss is None else 1
        self._directions = np.empty((0, *self._origin.shape), dtype=np.float32)
        self._probe_losses: dict[int, float] = {}
        self._asked = 0
        self._sigma, self._eta = self._lengths()
        if not self._base_due:
            self._draw_directions()

    def ask(self, limit: int) -> list[Proposal]:
        """At most ``limit`` of the points that the current phase still needs."""
        if limit < 1 or self.stop():
            return []
        if self._base_due:
            return [] if len(self._open) else [self._propose(self._point, _BASE, releasable=True)]
        wanted = range(self._asked, min(self._settings.probes, self._asked + limit))
        self._asked = wanted.stop
        return [self._propose(self._point + self._sigma * self._directions[i], i, releasable=False) for i in wanted]

    def tell(self, proposals: Sequence[Proposal], losses: Sequence[float]) -> None:
        """Take losses; after the last probe of a step, move."""
        for index, loss in self._open.resolve(proposals, losses):
            if index == _BASE:
                self._arrive(loss)
            else:
                self._probe_losses[index] = loss
        if not self._base_due and len(self._probe_losses) == self._settings.probes:
            self._descend()

    def stop(self) -> tuple[str, ...]:
        if self._base_loss < 0.0:
            return ("base point under the threshold",)
        if self._points_seen >= self._settings.steps:
            return (f"{self._settings.steps} steps",)
        if not len(self._origin):
            return ("no movable tokens",)
        return ()

    def _arrive(self, loss: float) -> None:
        self._base_loss = loss
        self._base_due = False
        self._points_seen += 1
        self._draw_directions()

    def _draw_directions(self) -> None:
        shape = self._origin.shape
        self._directions = np.stack([gaussian(self._rng, shape) for _ in range(self._settings.probes)])
        self._probe_losses = {}
        self._asked = 0

    def _descend(self) -> None:
        """Forward difference of Nesterov & Spokoiny (2017), then the normalised, projected step."""
        order = range(self._settings.probes)
        slopes = np.array([self._probe_losses[i] - self._base_loss for i in order], dtype=np.float32)
        gradient = np.tensordot(slopes / self._sigma, self._directions, axes=1) / self._settings.probes
        step = self._eta * unit_step(gradient.astype(np.float32), self._settings.step_norm)
        self._point = project_to_cone(self._point - step, self._origin, self._settings.kappa)
        self._base_due = True

    def _lengths(self) -> tuple[float, float]:
        """Standard deviation of a probe's entries, and length of a step, in embedding units."""
        settings = self._settings
        if settings.units == "absolute":
            return settings.mu, settings.eta
        token = mean_row_norm(self._origin)
        whole = token if settings.step_norm == "token" else float(np.linalg.norm(self._origin))
        width = max(1, self._matrix.shape[1])
        return settings.mu * token / width**0.5 or 1.0, settings.eta * whole

    def _propose(self, rows: FloatMatrix, index: int, *, releasable: bool) -> Proposal:
        matrix = self._matrix.copy()
        matrix[self._mask] = rows
        return self._open.add(Proposal(matrix, releasable=releasable, whole=True, label=self.name), index)
