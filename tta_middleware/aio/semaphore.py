"""A semaphore for tasks of several event loops, first come, first served."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from tta_middleware.aio import process as _process


class _Ticket:
    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._called = asyncio.Event()
        self.granted = False

    async def wait(self) -> None:
        await self._called.wait()

    def call(self) -> bool:
        """Wake the holder; False if its loop has ended."""
        try:
            self._loop.call_soon_threadsafe(self._called.set)
        except RuntimeError:
            return False
        self.granted = True
        return True


class SharedSemaphore:
    """At most ``limit`` holders at once, over all event loops and threads.

    Attributes:
        taken: slots that are held now.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = _process.Lock()
        self._queue: deque[_Ticket] = deque()
        self.taken = 0
        _process.forget_after_fork(self)

    def after_fork(self) -> None:
        """Whoever holds a slot or waits for one is in the parent."""
        _process.inherit(self._queue)
        self._queue, self.taken = deque(), 0

    @asynccontextmanager
    async def hold(self) -> AsyncIterator[None]:
        """Wait for a slot and keep it inside ``async with``."""
        await self._take()
        try:
            yield
        finally:
            self._pass_on()

    @contextmanager
    def hold_if_free(self) -> Iterator[bool]:
        """Keep a slot inside ``with`` if one is free now, and say whether; goes before nobody who waits."""
        with self._lock:
            # While somebody waits no slot is free: one that comes back is handed over at once.
            free = self.taken < self._limit
            self.taken += free
        try:
            yield free
        finally:
            if free:
                self._pass_on()

    async def _take(self) -> None:
        ticket = self._queue_up()
        if ticket is None:
            return
        called = False
        try:
            await ticket.wait()
            called = True
        finally:
            if not called:
                self._leave(ticket)

    def _queue_up(self) -> _Ticket | None:
        with self._lock:
            if self.taken < self._limit:
                self.taken += 1
                return None
            self._queue.append(_Ticket())
            return self._queue[-1]

    def _leave(self, ticket: _Ticket) -> None:
        """Give up a place in the queue, or the slot if it was handed over in the same moment."""
        with self._lock:
            if ticket in self._queue:
                self._queue.remove(ticket)
        if ticket.granted:
            self._pass_on()

    def _pass_on(self) -> None:
        """Hand the slot to the next in the queue whose loop still runs."""
        with self._lock:
            while self._queue:
                if self._queue.popleft().call():
                    return
            self.taken -= 1
