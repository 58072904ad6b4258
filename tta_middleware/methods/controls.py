"""Controls at the same budget: resampling, and random noise on the user's tokens, each best of N."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import PositiveFloat, PositiveInt, model_validator

from tta_middleware.config import Settings
from tta_middleware.methods.base import Needs, OpenProposals, Start
from tta_middleware.methods.geometry import Rows, gaussian, mean_row_norm, movable, unit_step
from tta_middleware.types import PromptEmbeddings, Proposal


class Resample(Settings):
    """Settings of plain resampling: the unmoved prompt again, at another temperature, until one answer passes."""

    name: ClassVar[str] = "resample"
    needs: ClassVar[Needs] = Needs()

    temperature: PositiveFloat = 1.0
    wave: PositiveInt = 2

    def build(self, start: Start) -> ResampleOptimiser:
        return ResampleOptimiser(self, start.prompt)


class ResampleOptimiser:
    """Endless waves of the same point; seeds differ by generation, which the search sees to."""

    name = "resample"

    def __init__(self, settings: Resample, prompt: PromptEmbeddings) -> None:
        self._settings = settings
        self._matrix = prompt.matrix
        self._open = OpenProposals()

    def ask(self, limit: int) -> list[Proposal]:
        temperature = self._settings.temperature
        return [
            self._open.add(Proposal(self._matrix, temperature=temperature, label=self.name), i)
            for i in range(min(limit, self._settings.wave))
        ]

    def tell(self, proposals: Sequence[Proposal], losses: Sequence[float]) -> None:
        self._open.resolve(proposals, losses)

    def stop(self) -> tuple[str, ...]:
        return ()


class Noise(Settings):
    """Settings of random noise with a growing radius.

    Attributes:
        wave: answers per wave; the search stops after the first wave with a safe and usable one.
        radius_from, radius_to: length of each row's noise as a share of the movable rows' mean norm, growing
            evenly over the first ``waves`` waves and constant afterwards.
        rows: as in :class:`~tta_middleware.methods.tsa.TSA`.

    Raises:
        ConfigurationError: the radius shrinks.
    """

    name: ClassVar[str] = "noise"
    needs: ClassVar[Needs] = Needs()

    wave: PositiveInt = 2
    waves: PositiveInt = 10
    radius_from: PositiveFloat = 0.5
    radius_to: PositiveFloat = 1.5
    rows: Rows = "user"

    @model_validator(mode="after")
    def _radius_grows(self) -> Noise:
        if self.radius_to < self.radius_from:
            raise ValueError(f"radius_to ({self.radius_to}) must not be below radius_from ({self.radius_from})")
        return self

    def build(self, start: Start) -> NoiseOptimiser:
        return NoiseOptimiser(self, start.prompt, start.rng)


class NoiseOptimiser:
    """Independent random points around the prompt, further out with every wave."""

    name = "noise"

    def __init__(self, settings: Noise, prompt: PromptEmbeddings, rng: np.random.Generator) -> None:
        self._settings = settings
        self._rng = rng
        self._matrix = prompt.matrix
        self._mask = movable(prompt, settings.rows)
        self._scale = mean_row_norm(prompt.matrix[self._mask])
        self._wave = 0
        self._open = OpenProposals()

    def ask(self, limit: int) -> list[Proposal]:
        if self.stop():
            return []
        radius = self._radius()
        self._wave += 1
        count = min(limit, self._settings.wave)
        return [self._open.add(self._propose(radius), i) for i in range(count)]

    def tell(self, proposals: Sequence[Proposal], losses: Sequence[float]) -> None:
        self._open.resolve(proposals, losses)

    def stop(self) -> tuple[str, ...]:
        return () if self._mask.any() else ("no movable tokens",)

    def _radius(self) -> float:
        settings = self._settings
        share = min(1.0, self._wave / max(1, settings.waves - 1))
        return settings.radius_from + share * (settings.radius_to - settings.radius_from)

    def _propose(self, radius: float) -> Proposal:
        shape = (int(self._mask.sum()), self._matrix.shape[1])
        matrix = self._matrix.copy()
        matrix[self._mask] += radius * self._scale * unit_step(gaussian(self._rng, shape), "token")
        return Proposal(matrix, label=self.name)
