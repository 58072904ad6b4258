"""One task behind one stream: structured concurrency for async generators (docs/decisions/005-owned-streams.md)."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeAlias, TypeVar, cast

import anyio

from tta_middleware.errors import ConfigurationError

T = TypeVar("T")
Send: TypeAlias = Callable[[T], Awaitable[None]]
"""Takes an item at once, before anything is awaited, and may wait afterwards: whoever is cancelled while it waits knows
that the item is on its way."""


@dataclass(frozen=True, slots=True, eq=False)
class Settled(Generic[T]):
    """What work in a task of its own came to.

    Such a task never ends with an error: asyncio prints those that nobody asked for, in the turn of a cancellation or
    when the loop is closed, and they may quote a text.
    """

    value: T | None = None
    error: Exception | None = None

    def result(self) -> T:
        """What the work gave.

        Raises:
            Exception: what it raised.
        """
        if self.error is not None:
            raise self.error
        return cast(T, self.value)


async def settled(work: Callable[[], Awaitable[T]]) -> Settled[T]:
    """Do ``work`` and keep what it gives or raises; for tasks of their own."""
    try:
        return Settled(await work())
    except Exception as error:  # noqa: BLE001  raised again where it is waited for
        return Settled(error=error)


async def owned(
    produce: Callable[[Send[T]], Awaitable[None]], ahead: int = 8, reader: asyncio.Task[Any] | None = None
) -> AsyncGenerator[T, None]:
    """Yield what ``produce`` sends from a task of its own.

    A consumer may leave an async generator at any yield and have it closed from another task. A task group that is
    open across a yield breaks then, so the groups live in the task of ``produce``, which is cancelled and waited
    for when the generator ends in whatever way. While more than ``ahead`` items lie there ``produce`` waits.

    ``reader`` is the task that reads the generator to its end, where there is one: when that is over, so is
    ``produce``, even if the generator lies unclosed in a traceback.

    Raises:
        Exception: what ``produce`` raised, after everything that it had sent.
    """
    refuse_other_libraries()
    # Not bounded by itself: a send that waits for room may be cancelled with its item or without; nobody could tell.
    send, receive = anyio.create_memory_object_stream[T](math.inf)
    taken = anyio.Event()

    async def put(item: T) -> None:
        send.send_nowait(item)
        while send.statistics().current_buffer_used > ahead:
            await taken.wait()

    async def run() -> None:
        with send:
            await produce(put)

    task = asyncio.create_task(settled(run), name="tta-stream")

    def stop(_: object) -> None:
        task.cancel()

    if reader is not None:
        reader.add_done_callback(stop)
    try:
        async for item in receive:
            # All tasks run on this loop: those that wait see the buffer as it is now, and the next event for next time.
            taken, emptied = anyio.Event(), taken
            emptied.set()
            yield item
        (await task).result()
    finally:
        if reader is not None:
            reader.remove_done_callback(stop)
        task.cancel()
        try:
            if not task.done():
                with anyio.CancelScope(shield=True):
                    await asyncio.wait([task])
        finally:
            # Both ends are closed here as well: a task that is cancelled before its first step never enters its block.
            # The shield holds against anyio's scopes only; gather, under one, hands every cancellation on anew.
            send.close()
            receive.close()


def refuse_other_libraries() -> None:
    """Raises ConfigurationError under trio, where tasks of asyncio cannot run."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise ConfigurationError(
            "answers are made on asyncio, and no loop of asyncio runs here; from trio, make the sync call in a thread: "
            "await trio.to_thread.run_sync(model.invoke, question)"
        ) from None


async def cancelled_once(work: Coroutine[Any, Any, T]) -> T:
    """What ``work`` gives, from a task of its own that is cancelled once and waited for.

    A scope of anyio cancels its task anew in every turn of the loop until that is out. Libraries that gather tasks of
    asyncio hand each of these cancellations on, also to what cleans up already.

    Raises:
        Exception: what ``work`` raises.
    """
    task = asyncio.create_task(settled(lambda: work), name="tta-work")
    try:
        await asyncio.wait([task])
    finally:
        if not task.done():
            task.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait([task])
            work.close()  # a task that is cancelled before its first step has not begun it
    return task.result().result()


class Closable(Protocol):
    """Something that holds what has to be let go of."""

    async def aclose(self) -> None: ...


async def close_all(parts: Iterable[Closable]) -> None:
    """Close all of them, one after the other, whatever one raises.

    Raises:
        Exception: the last that one of them raised.
    """
    async with AsyncExitStack() as closing:
        for part in reversed([*parts]):
            closing.push_async_callback(part.aclose)


async def unless_cancelled_within(work: Awaitable[T], error: Exception) -> T:
    """What ``work`` gives. A cancellation that nobody asked of this task comes from within: what it waits for ended.

    Task groups take a child that ends so for one that they have cancelled themselves, and say nothing of it; whoever
    waits for the task takes it for his own.

    Raises:
        Exception: what ``work`` raises, and ``error`` in place of such a cancellation.
    """
    watched = _Watched(work)
    try:
        return await watched
    except asyncio.CancelledError as cancelled:
        if watched.asked_for(cancelled):
            raise
        raise error from None


class _Watched(Generic[T]):
    """Sees each cancellation as it comes in from the event loop.

    `Task.cancelling` says then whether this task was meant, and says it no more once a task group of anyio (4.16) was
    left: that takes back, beside its own cancellations of the task, those of groups within its children's.
    """

    def __init__(self, work: Awaitable[T]) -> None:
        self._work = work
        self._by_task = self._by_scope = False

    def __await__(self) -> Generator[Any, None, T]:
        steps, thrown = self._awaited().__await__(), None
        while True:
            try:
                waited_for = next(steps) if thrown is None else steps.throw(thrown)
            except StopIteration as done:
                return cast(T, done.value)
            try:
                thrown = None
                yield waited_for
            except GeneratorExit:
                steps.close()
                raise
            except BaseException as error:  # noqa: BLE001  handed on
                self._note(error)
                thrown = error

    async def _awaited(self) -> T:
        return await self._work

    def _note(self, error: BaseException) -> None:
        if isinstance(error, asyncio.CancelledError) and _being_cancelled():
            self._by_scope = self._by_scope or _of_a_scope(error)
            self._by_task = self._by_task or not _of_a_scope(error)

    def asked_for(self, cancelled: asyncio.CancelledError) -> bool:
        """Whether the task, or a scope around it, was cancelled, and not only what it waits for."""
        return self._by_task or (self._by_scope and _of_a_scope(cancelled)) or _being_cancelled()


def _being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


def _of_a_scope(cancelled: asyncio.CancelledError) -> bool:
    """Whether it is one of anyio's, which knows its own by these words as well."""
    return str(cancelled).startswith(("Cancelled via cancel scope ", "Cancelled by cancel scope "))


def first_error(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error of a task group, which cancels the rest; callers expect it bare."""
    first: BaseException = errors
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return first
