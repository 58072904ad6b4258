"""An event loop whose clock jumps to the next timer: delays of any length, in any order, without waiting for them.

    def test_a_slow_moderator() -> None:
        answer = run_in_virtual_time(ask_with_a_moderator_that_takes_a_minute())

Only timers of the loop (``asyncio.sleep``, ``anyio.sleep``, deadlines) take virtual time. Code in other threads takes
real time, which this loop does not wait for: the clock jumps past it, so keep threads out of such tests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Starts at 0; time passes only while nothing is ready to run."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__()
        selector = self._selector  # type: ignore[attr-defined]
        poll = selector.select

        def jump(timeout: float | None = None) -> Any:
            # The loop asks for the time until its next timer; instead of sleeping so long, the clock moves on.
            if timeout:
                self._now += timeout
            return poll(0 if timeout is not None else None)

        selector.select = jump

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._now


def run_in_virtual_time(work: Coroutine[Any, Any, T]) -> T:
    """Run ``work`` to its end on a loop of its own; give a guard ``clock=now`` for budgets of seconds.

    Raises:
        Exception: what ``work`` raises.
    """
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(work)


def now() -> float:
    """The running loop's time, as a guard's clock."""
    return asyncio.get_running_loop().time()


class ManualClock:
    """A clock that only its own :meth:`sleep` and the test move; for parts that take a clock and a sleeper.

    Attributes:
        now: seconds.
        slept: how long each sleep was.
    """

    def __init__(self, now: float = 0.0) -> None:
        self.now = now
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        """Over at once; the clock has moved on."""
        self.slept.append(seconds)
        self.now += seconds
