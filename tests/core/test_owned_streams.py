"""A stream that is closed while it is cancelled again and again leaves nothing open."""

from __future__ import annotations

import asyncio
import gc

import anyio
import anyio.lowlevel

from tta_middleware.aio.streams import Send, cancelled_once, owned


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
