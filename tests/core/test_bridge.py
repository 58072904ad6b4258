"""The sync bridge."""

from __future__ import annotations

import gc
import threading
from collections.abc import AsyncGenerator, Iterator
from functools import partial

import anyio
import anyio.lowlevel
import pytest

from tta_middleware.aio import bridge


@pytest.fixture(autouse=True)
def no_bridge_is_left() -> Iterator[None]:
    yield
    bridge.shutdown()
    assert "tta-sync-bridge" not in {thread.name for thread in threading.enumerate()}


async def double(number: int) -> int:
    await anyio.lowlevel.checkpoint()
    return 2 * number


def test_results_and_errors_come_back() -> None:
    assert bridge.run(partial(double, 4)) == 8

    async def fail() -> None:
        raise ValueError("told")

    with pytest.raises(ValueError, match="told"):
        bridge.run(fail)


async def test_it_works_inside_a_running_loop() -> None:
    assert bridge.run(partial(double, 1)) == 2


def test_a_call_has_timeouts_of_its_own() -> None:
    async def late() -> None:
        raise TimeoutError("of the call")

    with pytest.raises(TimeoutError, match="of the call"):
        bridge.run(late)


def test_all_calls_share_one_loop() -> None:
    async def loop_id() -> int:
        return threading.get_ident()

    results: list[int] = []
    threads = [threading.Thread(target=lambda: results.append(bridge.run(loop_id))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(results)) == 1
    assert results[0] != threading.get_ident()


class Count:
    """An async generator that notes how it ended."""

    def __init__(self) -> None:
        self.closed = False

    async def items(self) -> AsyncGenerator[int, None]:
        try:
            for number in range(1_000_000):
                yield number
        finally:
            self.closed = True


def test_an_async_stream_is_iterated_and_closed() -> None:
    count = Count()
    stream = bridge.iterate(count.items())
    assert [next(stream), next(stream)] == [0, 1]
    assert not count.closed
    stream.close()
    assert count.closed


def test_a_stream_that_ends_ends() -> None:
    async def three() -> AsyncGenerator[int, None]:
        for number in (1, 2, 3):
            yield number

    assert list(bridge.iterate(three())) == [1, 2, 3]


def test_a_dropped_stream_may_be_collected_on_the_bridges_own_thread(caplog: pytest.LogCaptureFixture) -> None:
    closed = threading.Event()

    async def endless() -> AsyncGenerator[int, None]:
        try:
            while True:
                yield 1
                await anyio.sleep(0.001)
        finally:
            closed.set()
            raise RuntimeError("the quick brown fox 7741")

    async def collect() -> None:
        gc.collect()

    gc.disable()
    try:
        stream = bridge.iterate(endless())
        assert next(stream) == 1
        cycle: list[object] = [stream]
        cycle.append(cycle)
        del stream, cycle
        bridge.run(collect)
    finally:
        gc.enable()
    assert closed.wait(10)
    bridge.run(collect)
    assert "fox" not in caplog.text  # asyncio would print what nobody waits for


def test_shutdown_cancels_what_runs_and_a_later_call_starts_anew() -> None:
    started, cancelled = threading.Event(), threading.Event()

    async def wait_for_ever() -> None:
        started.set()
        try:
            await anyio.sleep_forever()
        finally:
            cancelled.set()

    def call() -> None:
        with pytest.raises(BaseException):  # noqa: B017, PT011  the portal's cancellation type is its own
            bridge.run(wait_for_ever)

    thread = threading.Thread(target=call)
    thread.start()
    assert started.wait(10)
    bridge.shutdown()
    thread.join(10)
    assert cancelled.is_set()
    assert bridge.run(partial(double, 3)) == 6
