"""The end of the server, as requests under way see it: deadlines are drawn in, so that each ends in good order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import inf

import anyio


class Drain:
    """Deadlines of requests under way, until somebody says that there is less time."""

    # Used on one event loop, and nothing is awaited between reading and writing.

    def __init__(self) -> None:
        self._scopes: set[anyio.CancelScope] = set()
        self._until = inf

    @contextmanager
    def by(self, deadline: float) -> Iterator[anyio.CancelScope]:
        """A scope that ends at ``deadline``, by the event loop's clock, or earlier where the server stops before."""
        with anyio.CancelScope(deadline=min(deadline, self._until)) as scope:
            self._scopes.add(scope)
            try:
                yield scope
            finally:
                self._scopes.discard(scope)

    def begin(self, seconds: float) -> None:
        """The server stops: what is under way has this long."""
        self._until = anyio.current_time() + seconds
        for scope in self._scopes:
            scope.deadline = min(scope.deadline, self._until)

    @property
    def over(self) -> bool:
        """Whether that time is up."""
        return anyio.current_time() >= self._until
