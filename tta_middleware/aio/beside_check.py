"""Work that runs beside the check that may forbid it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio

from tta_middleware.aio.streams import first_error

T = TypeVar("T")


async def unless_refused(
    refuse: Callable[[], Awaitable[str]], passed: anyio.Event, work: Callable[[], Awaitable[T]]
) -> tuple[str, T | None]:
    """Run ``work`` and ``refuse`` side by side, so that a check which passes costs no time.

    ``passed`` is set once ``refuse`` gives an empty reason: the gate at which the work waits before it says anything.
    With a reason the work is cancelled and the gate stays shut, so that what waits there is never said. An error of the
    work waits there, too: it says something of what was asked.

    Returns:
        The reason, and the work's result; one of both is empty.

    Raises:
        Exception: the first error of either.
    """
    reason, result = "", None
    try:
        async with anyio.create_task_group() as group:
            # Around the work alone: a refusal ends the work and not the request.
            with anyio.CancelScope() as scope:

                async def check() -> None:
                    nonlocal reason
                    reason = await refuse()
                    if reason:
                        scope.cancel()
                    else:
                        passed.set()

                group.start_soon(check)
                try:
                    result = await work()
                except Exception:
                    await passed.wait()
                    raise
    except BaseExceptionGroup as errors:
        raise first_error(errors) from None
    return reason, None if reason else result
