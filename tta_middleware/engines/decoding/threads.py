"""How many threads multiply: chosen while the model runs, since neighbours come and go.

Threads that wait for each other cost most where matrices are small. On two idle cores two threads take a step of
SmolLM2 in 28 ms and one in 41; with one of the cores busy two take 105 and one still 41 (docs/decisions/008).
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tta_middleware.engines.decoding.loaded import LoadedModel

_LOOK_EVERY = 24
_LOOK_SELDOM = 192
_LOOK_STEPS = 2
_REMEMBERED = 7
_CLEARLY_LESS = 0.9
_SUDDENLY_MORE = 1.4
# A pass over so many columns takes about twice as long as one over a single column, with any number of threads.
_DOUBLING = 100


class ThreadChoice:
    """Takes times of forward passes and says how many threads the next one gets. Pure: no clock, no torch.

    Now and then another number is tried for two passes, sooner when passes suddenly take longer; the better one stays.

    Args:
        numbers: numbers of threads to choose from, the first of them to begin with.
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        self._numbers = list(numbers)
        self._current = self._candidate = 0
        self._times: deque[float] = deque(maxlen=_REMEMBERED)
        self._tried: list[float] = []
        self._wait, self._every = _LOOK_EVERY, _LOOK_EVERY

    @property
    def threads(self) -> int:
        """For the next pass."""
        return self._numbers[self._candidate]

    def record_pass(self, columns: int, seconds: float) -> None:
        """What the last pass took, with this many columns."""
        cost = seconds / (1.0 + columns / _DOUBLING)
        if self._candidate != self._current:
            self._try(cost)
            return
        known = statistics.median(self._times) if len(self._times) >= 3 else None
        self._times.append(cost)
        self._wait -= 1
        if known is not None and (self._wait <= 0 or min(list(self._times)[-2:]) > _SUDDENLY_MORE * known):
            self._look()

    def _look(self) -> None:
        if len(self._numbers) > 1:
            self._candidate = (self._current + 1) % len(self._numbers)

    def _try(self, cost: float) -> None:
        self._tried.append(cost)
        if len(self._tried) < _LOOK_STEPS:
            return
        better = min(self._tried) < _CLEARLY_LESS * min(list(self._times)[-3:])
        self._every = _LOOK_EVERY if better else min(_LOOK_SELDOM, 2 * self._every)
        if better:
            self._current = self._candidate
            self._times.clear()
        self._candidate, self._wait = self._current, self._every
        self._tried.clear()


class ThreadTuner:
    """A choice that is carried out in torch; without numbers to choose from it does nothing."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self._choice = ThreadChoice(numbers) if len(numbers) > 1 else None
        self._most = max(numbers)

    @classmethod
    def for_model(cls, model: LoadedModel) -> ThreadTuner:
        """Only where the number of threads changes no bit of the result: packed weights on a CPU."""
        import torch

        numbers = [torch.get_num_threads()]
        while model.steady and numbers[-1] > 1:
            numbers.append(numbers[-1] // 2)
        return cls(numbers)

    def begin(self) -> None:
        """Set the threads of the next pass."""
        if self._choice is None:
            return
        import torch

        if torch.get_num_threads() != self._choice.threads:
            torch.set_num_threads(self._choice.threads)

    def rest(self) -> None:
        """Give torch its number back: threads that the program starts later take over what was set last."""
        if self._choice is not None:
            import torch

            torch.set_num_threads(self._most)

    def record_pass(self, columns: int, seconds: float) -> None:
        """What the pass took."""
        if self._choice is not None:
            self._choice.record_pass(columns, seconds)
