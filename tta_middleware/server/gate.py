"""Places for requests that are under way at once, and a queue before them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from tta_middleware.moderation.server import ApiError


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


def too_many(what: str, retry_after: int) -> ApiError:
    """The error that asks a client to come again later."""
    return ApiError(
        429,
        f"{what}; try again in {retry_after} s",
        kind="rate_limit_error",
        code="rate_limit_exceeded",
        headers={"retry-after": str(retry_after)},
    )
