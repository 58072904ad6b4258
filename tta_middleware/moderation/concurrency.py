"""Running calls side by side without exception groups."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import anyio

from tta_middleware.errors import ModerationError

T = TypeVar("T")


async def gather(calls: Sequence[Callable[[], Awaitable[T]]], *, limit: int | None = None) -> list[T]:
    """Results in the order of ``calls``, at most ``limit`` running at once.

    Raises:
        ModerationError: the first that a call raised; the other calls are cancelled and have ended.
    """
    if len(calls) == 1:
        return [await calls[0]()]
    results: dict[int, T] = {}
    failures: list[ModerationError] = []
    slots = anyio.CapacityLimiter(limit or max(len(calls), 1))

    async def run(index: int) -> None:
        try:
            async with slots:
                results[index] = await calls[index]()
        except ModerationError as error:
            failures.append(error)
            group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        for index in range(len(calls)):
            group.start_soon(run, index)
    if failures:
        raise failures[0]
    return [results[index] for index in range(len(calls))]
