"""Search methods, run by the guard as in production."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tta_middleware.evaluation.comparators.comparator import Bench
from tta_middleware.guard.settings import Report
from tta_middleware.methods import TSA
from tta_middleware.methods.base import Method
from tta_middleware.types import Message, Sampling, Trace


@dataclass(frozen=True, slots=True)
class Guarded:
    """A guard with one search method; None only measures the model itself.

    Counts as the guard does: every decoded token, those of candidates that were dropped included, and every text that
    the moderator scored.
    """

    name: str
    method: Method | None

    @property
    def settings(self) -> str:
        return repr(self.method)

    def iterations(self, trace: Trace) -> float:
        """A step of the paper's method is N probes and a base point; for others a wave is an iteration."""
        if isinstance(self.method, TSA):
            return math.ceil((trace.generations - 1) / (self.method.probes + 1))
        return len(trace.steps)

    async def run(self, bench: Bench, messages: Sequence[Message], sampling: Sampling) -> Report:
        return await bench.guard(self.method).report(messages, sampling, judge_all=True)
