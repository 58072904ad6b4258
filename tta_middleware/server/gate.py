"""Places for requests that are under way at once, and a queue before them."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import anyio

from tta_middleware.moderation.server import ApiError
from tta_middleware.server.keys import Caller


class Gate:
    """At most ``places`` at once, at most ``queue`` waiting, in the order in which they came."""

    def __init__(self, places: int, queue: int, retry_after: int) -> None:
        self._semaphore, self._places = anyio.Semaphore(places), places
        self._queue, self._retry_after = queue, retry_after

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Hold a place inside ``async with``.

        Raises:
            ApiError: 429, all places are taken and the queue is full.
        """
        full = self._semaphore.value == 0
        if full and self._semaphore.statistics().tasks_waiting >= self._queue:
            raise too_many("the server is busy and its queue is full", self._retry_after)
        async with self._semaphore:
            yield

    @property
    def taken(self) -> int:
        """Places that are held."""
        return self._places - self._semaphore.value

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._semaphore.statistics().tasks_waiting


class Shares:
    """How many places each key holds, against what it may hold."""

    def __init__(self, retry_after: int) -> None:
        self._held: Counter[str] = Counter()
        self._retry_after = retry_after

    @contextmanager
    def one(self, caller: Caller) -> Iterator[None]:
        """Counts as one more inside ``with``.

        Raises:
            ApiError: 429, the key has as many answers under way as it may.
        """
        name, most = caller.name or "", caller.rights.concurrency
        if most is not None and self._held[name] >= most:
            raise too_many(f"this key has {most} answers under way, as many as it may", self._retry_after)
        self._held[name] += 1
        try:
            yield
        finally:
            self._held[name] -= 1
            self._held += Counter()  # names of keys that are gone do not pile up


def too_many(what: str, retry_after: int) -> ApiError:
    """The error that asks a client to come again later."""
    return ApiError(
        429,
        f"{what}; try again in {retry_after} s",
        kind="rate_limit_error",
        code="rate_limit_exceeded",
        headers={"retry-after": str(retry_after)},
    )
