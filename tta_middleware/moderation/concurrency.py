"""Running calls side by side without exception groups."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import anyio

from tta_middleware.aio.streams import first_error, unless_cancelled_within
from tta_middleware.errors import ModerationUnavailableError

T = TypeVar("T")


async def gather(calls: Sequence[Callable[[], Awaitable[T]]], *, limit: int | None = None) -> list[T]:
    """Results in the order of ``calls``, at most ``limit`` running at once.

    Raises:
        Exception: the first that a call raised, bare however many calls there are; the other calls are cancelled
            and have ended.
        ModerationUnavailableError: one of several was cancelled from within.
    """
    if len(calls) == 1:
        return [await calls[0]()]
    results: dict[int, T] = {}
    slots = anyio.CapacityLimiter(limit or max(len(calls), 1))

    async def run(index: int) -> None:
        within = ModerationUnavailableError("the work of one of several calls was cancelled", cause="cancelled")
        async with slots:
            results[index] = await unless_cancelled_within(calls[index](), within)

    try:
        async with anyio.create_task_group() as group:
            for index in range(len(calls)):
                group.start_soon(run, index)
    except BaseExceptionGroup as errors:
        raise first_error(errors) from None
    return [results[index] for index in range(len(calls))]
