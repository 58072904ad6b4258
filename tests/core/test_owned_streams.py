"""A stream that is closed while it is cancelled again and again leaves nothing open."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from tta_middleware.aio.streams import Send, cancelled_once, owned, unless_cancelled_within
from tta_middleware.moderation.shared import SharedCall, join_all
from tta_middleware.testing.delays import turns


async def test_a_stream_under_gather_in_a_scope_is_closed() -> None:
    ended = anyio.Event()

    async def produce(send: Send[str]) -> None:
        await send("first")
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                for _ in range(5):
                    await anyio.lowlevel.checkpoint()
            ended.set()

    async def read() -> None:
        async for _ in owned(produce):
            scope.cancel()

    with anyio.CancelScope() as scope:
        await asyncio.gather(read())  # hands on what the scope does, once in every turn of the loop
    await ended.wait()
    gc.collect()  # what was left open would warn here


@pytest.mark.parametrize("later", range(6))
async def test_a_stream_that_is_closed_is_cancelled_and_not_broken_off_from_within(later: int) -> None:
    """Groups of anyio within a task's children take back what nobody asked of them."""
    ended: list[type[BaseException]] = []

    async def child() -> None:
        async with anyio.create_task_group() as group:
            group.cancel_scope.cancel()
            await anyio.sleep_forever()

    async def parent() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(child)
            await anyio.sleep_forever()

    async def work() -> None:
        try:
            await unless_cancelled_within(parent(), RuntimeError("from within"))
        except BaseException as error:
            ended.append(type(error))
            raise

    async def produce(send: Send[str]) -> None:
        await send("first")
        await work()

    stream = owned(produce)
    await anext(stream)
    await turns(later)
    await stream.aclose()
    assert ended == [asyncio.CancelledError]


async def test_work_that_is_cancelled_once_cleans_up_before_its_scope_is_left() -> None:
    cleaned = False

    async def work() -> None:
        nonlocal cleaned
        try:
            await anyio.sleep_forever()
        finally:
            for _ in range(5):
                await asyncio.sleep(0)
            cleaned = True

    with anyio.CancelScope() as scope:
        asyncio.get_running_loop().call_soon(scope.cancel)
        await cancelled_once(work())
    assert cleaned


SECRET = "the quick brown fox 7741"


async def fails_while_it_is_cancelled() -> None:
    try:
        await asyncio.Event().wait()
    finally:
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        raise RuntimeError(SECRET)


async def read_one_that_fails() -> None:
    async def produce(send: Send[str]) -> None:
        await send("first")
        await fails_while_it_is_cancelled()

    async for _ in owned(produce):
        pass


async def work_that_fails() -> None:
    await cancelled_once(fails_while_it_is_cancelled())


async def share_calls_that_fail() -> None:
    await join_all([SharedCall(fails_while_it_is_cancelled) for _ in range(2)])


@pytest.mark.parametrize("surface", [read_one_that_fails, work_that_fails, share_calls_that_fail])
@pytest.mark.parametrize("cancellations", [0, 1, 2])
def test_asyncio_prints_no_error_of_what_was_given_up(
    surface: Callable[[], Coroutine[Any, Any, None]], cancellations: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Given up once, twice, or by the end of the loop."""

    async def give_up() -> None:
        given_up.append(asyncio.create_task(surface()))
        for _ in range(5):
            await asyncio.sleep(0)
        for _ in range(cancellations):
            given_up[0].cancel()
            await asyncio.sleep(0)
        if cancellations:
            with pytest.raises(asyncio.CancelledError):
                await given_up[0]
            for _ in range(5):
                await asyncio.sleep(0)

    given_up: list[asyncio.Task[None]] = []
    with caplog.at_level(logging.WARNING, "asyncio"):
        asyncio.run(give_up())
        given_up.clear()
        gc.collect()
    assert SECRET not in caplog.text


async def test_an_error_in_the_turn_of_a_cancellation_is_not_printed(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        await fail.wait()
        raise RuntimeError(SECRET)

    fail = asyncio.Event()
    waiting = asyncio.create_task(cancelled_once(work()))
    for _ in range(3):
        await asyncio.sleep(0)
    fail.set()
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    del waiting
    gc.collect()
    assert SECRET not in caplog.text


async def test_of_several_calls_none_goes_on_when_their_caller_is_cancelled_twice() -> None:
    ended: list[int] = []

    async def call(at: int) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.lowlevel.checkpoint()
            ended.append(at)

    caller = asyncio.create_task(join_all([SharedCall(partial(call, at)) for at in range(3)]))
    await anyio.wait_all_tasks_blocked()
    for _ in range(2):
        caller.cancel()
        await asyncio.sleep(0)
    await asyncio.wait([caller])
    await anyio.wait_all_tasks_blocked()
    assert ended == [0, 1, 2]
