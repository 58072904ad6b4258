"""A call that several tasks wait for."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable, Iterable
from typing import Generic, TypeVar

import anyio

from tta_middleware.errors import ModerationError, ModerationUnavailableError

T = TypeVar("T")


class SharedCall(Generic[T]):
    """Runs once for all who wait for it, in one event loop.

    Cancelling one waiter leaves the others theirs. When the last one goes, the call is cancelled and has ended
    before that one's cancellation goes on. The call's deadline is the latest of its waiters'.

    Args:
        call: what to run.
        ended: called once the call is over, however it ended.
    """

    def __init__(self, call: Callable[[], Awaitable[T]], ended: Callable[[], object] = lambda: None) -> None:
        self._scope = anyio.CancelScope(deadline=anyio.current_effective_deadline())
        self._waiters = 0
        self._ending = False
        self._task = asyncio.create_task(self._run(call))
        self._ended = ended
        self._task.add_done_callback(self._over)

    @property
    def joinable(self) -> bool:
        """Whether a new waiter would still get a result."""
        return not (self._ending or self._task.done())

    async def join(self) -> T:
        """The call's result.

        Raises:
            ModerationError: a copy of the one that the call raised.
        """
        return (await join_all([self]))[0]

    def _enter(self) -> None:
        self._waiters += 1
        self._scope.deadline = max(self._scope.deadline, anyio.current_effective_deadline())

    def _over(self, task: asyncio.Task[T | ModerationError]) -> None:
        # An error that nobody waits for any more is taken note of: asyncio would print it, and it may quote a text.
        if not task.cancelled():
            task.exception()
        self._ended()

    async def _result(self) -> T:
        await asyncio.wait([self._task])
        outcome = self._task.result()
        if isinstance(outcome, ModerationError):
            # One exception raised in many tasks would collect all their tracebacks.
            raise copy.copy(outcome)
        return outcome

    async def _leave(self) -> None:
        self._waiters -= 1
        if self._waiters or self._task.done():
            return
        self._ending = True
        self._task.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.wait([self._task])

    async def _run(self, call: Callable[[], Awaitable[T]]) -> T | ModerationError:
        with self._scope:
            try:
                return await call()
            except ModerationError as error:
                return error
        return ModerationUnavailableError("no verdict before the deadline", cause="deadline")


async def join_all(calls: Iterable[SharedCall[T]]) -> list[T]:
    """The results of several calls; all are held until the last is there.

    Raises:
        ModerationError: a copy of the first that one of them raised, in the order of ``calls``.
    """
    held = list(calls)
    for call in held:
        call._enter()
    try:
        return [await call._result() for call in held]
    finally:
        for call in held:
            await call._leave()
