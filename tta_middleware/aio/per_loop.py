"""One resource per running event loop: HTTP clients cannot be shared between loops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Generic, TypeVar

import anyio

from tta_middleware.aio import process as _process

T = TypeVar("T")

_FOREIGN_CLOSE_SECONDS = 5.0


class PerLoop(Generic[T]):
    """Creates a resource the first time a loop asks for it and closes it when that loop ends.

    Each resource lives in a suspended async generator. ``asyncio.run`` and its relatives close the generators of
    a loop before they close the loop, so sockets end with their loop even if nobody calls :meth:`aclose`.
    """

    def __init__(self, create: Callable[[], T], close: Callable[[T], Awaitable[object]]) -> None:
        self._create = create
        self._close = close
        self._lock = _process.Lock()
        self._lives: dict[asyncio.AbstractEventLoop, tuple[T, AsyncGenerator[T, None]]] = {}
        _process.forget_after_fork(self)

    def after_fork(self) -> None:
        """The parent goes on using its sockets; the child opens its own."""
        _process.inherit(self._lives)
        self._lives = {}

    async def get(self) -> T:
        """The running loop's resource."""
        loop = asyncio.get_running_loop()
        with self._lock:
            if loop in self._lives:
                return self._lives[loop][0]
            self._lives = {known: life for known, life in self._lives.items() if not known.is_closed()}
        resource = self._create()
        life = self._live(loop, resource)
        await anext(life)
        with self._lock:
            self._lives[loop] = (resource, life)
        return resource

    async def _live(self, loop: asyncio.AbstractEventLoop, resource: T) -> AsyncGenerator[T, None]:
        try:
            yield resource
        finally:
            with self._lock:
                self._lives.pop(loop, None)
            await self._close(resource)

    async def aclose(self) -> None:
        """Close every loop's resource, each on its own loop; idempotent. A later :meth:`get` opens a new one."""
        with self._lock:
            lives = [(loop, life) for loop, (_, life) in self._lives.items()]
        here = asyncio.get_running_loop()
        with anyio.CancelScope(shield=True):
            for loop, life in lives:
                if loop is here:
                    await life.aclose()
                elif loop.is_running():
                    await _close_elsewhere(loop, life)


async def _close_elsewhere(loop: asyncio.AbstractEventLoop, life: AsyncGenerator[T, None]) -> None:
    async def close() -> None:
        await life.aclose()

    # The other loop may stop before it gets to this; then it has closed the generator itself.
    with anyio.move_on_after(_FOREIGN_CLOSE_SECONDS):
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(close(), loop))
