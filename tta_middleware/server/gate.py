"""Places for requests that are under way at once, and a queue before them."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

import anyio

from tta_middleware.http_api import ApiError
from tta_middleware.server.keys import Caller


@dataclass(eq=False, slots=True)
class _Turn:
    """A request in the queue, and the places that it waits for."""

    count: int
    comes: anyio.Event = field(default_factory=anyio.Event)


class Gate:
    """At most ``places`` at once, at most ``queue`` requests waiting, in the order in which they came.

    A request takes all of its places or none, so that no two wait for what the other holds.
    """

    # Used on one event loop, and nothing is awaited between looking and taking. Whoever gives places back hands them to
    # those at the head of the queue, takes these out of it, and only then wakes them.

    def __init__(self, places: int, queue: int, retry_after: int) -> None:
        self._free, self._places = places, places
        self._waiting: deque[_Turn] = deque()
        self._queue, self._retry_after = queue, retry_after

    @asynccontextmanager
    async def places(self, count: int = 1) -> AsyncIterator[None]:
        """Hold so many places, at most all that there are, inside ``async with``.

        Raises:
            ApiError: 429, too few are free and the queue is full.
        """
        if self._waiting or count > self._free:
            await self._wait(count)
        else:
            self._free -= count
        try:
            yield
        finally:
            self._give_back(count)

    async def _wait(self, count: int) -> None:
        if len(self._waiting) >= self._queue:
            raise too_many("the server is busy and its queue is full", self._retry_after)
        turn = _Turn(count)
        self._waiting.append(turn)
        try:
            await turn.comes.wait()
        except BaseException:
            if turn in self._waiting:
                self._waiting.remove(turn)
                self._let_in()  # whoever stood behind it may want less
            else:
                self._give_back(count)
            raise

    def _give_back(self, count: int) -> None:
        self._free += count
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting and self._waiting[0].count <= self._free:
            turn = self._waiting.popleft()
            self._free -= turn.count
            turn.comes.set()

    @property
    def taken(self) -> int:
        """Places that are held."""
        return self._places - self._free

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)


class Shares:
    """How many places each key holds, against what it may hold."""

    def __init__(self, retry_after: int) -> None:
        self._held: Counter[str] = Counter()
        self._retry_after = retry_after

    @contextmanager
    def hold(self, caller: Caller, count: int = 1) -> Iterator[None]:
        """Counts as so many more inside ``with``.

        Raises:
            ApiError: 429, the key has as many answers under way as it may.
        """
        name, most = caller.name or "", caller.rights.concurrency
        if most is not None and self._held[name] + count > most:
            raise too_many(f"this key may have {most} answers under way, and no more", self._retry_after)
        self._held[name] += count
        try:
            yield
        finally:
            self._held[name] -= count
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
