"""A call that several tasks wait for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Generic, TypeVar

import anyio

from tta_middleware.aio.streams import settled
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
        self._task = asyncio.create_task(settled(partial(self._run, call)))
        self._task.add_done_callback(lambda _: ended())

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

    async def _result(self) -> T:
        await asyncio.wait([self._task])
        outcome = self._task.result()
        if isinstance(outcome.error, ModerationError):
            # One exception raised in many tasks would collect all their tracebacks.
            raise _anew(outcome.error)
        return outcome.result()

    def _leave(self) -> bool:
        """One waiter less; whether the call was cancelled with it."""
        self._waiters -= 1
        if self._waiters or self._task.done():
            return False
        self._ending = True
        self._task.cancel()
        return True

    async def _run(self, call: Callable[[], Awaitable[T]]) -> T:
        with self._scope:
            return await call()
        raise ModerationUnavailableError("no verdict before the deadline", cause="deadline")


def _anew(error: ModerationError) -> ModerationError:
    """Another one like it, made without its constructor: whoever wrote a moderator may have one of any kind."""
    twin: ModerationError = type(error).__new__(type(error), *error.args)
    twin.__dict__.update(error.__dict__)
    return twin


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
        # All at once: whoever is cancelled again while it waits here leaves none of them behind.
        if ending := [call._task for call in held if call._leave()]:
            with anyio.CancelScope(shield=True):
                await asyncio.wait(ending)
