"""The one bridge from sync code to the async core.

Sync calls run on one event loop in a background thread of the process, which the first of them starts. That works
inside a running loop, too (notebooks): the caller's thread blocks, the bridge's loop is another one. The thread is a
daemon and ends with the process or with :func:`shutdown`, whichever comes first; both cancel what still runs. A forked
child starts a thread of its own with its first call; a stream that was begun before the fork stays the parent's.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from concurrent.futures import CancelledError, Future
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Final, TypeVar

from anyio.from_thread import BlockingPortal, start_blocking_portal

from tta_middleware.aio import process as _process
from tta_middleware.aio.streams import settled
from tta_middleware.errors import ConfigurationError, EngineError

T = TypeVar("T")

_END: Final = object()

_LOOK_SECONDS: Final = 1.0
"""How often who waits looks whether the loop that it waits for is still there."""

_kept: set[Any] = set()
"""Streams that are being iterated, and closings under way; both must outlive their iterators."""


class _Bridge:
    """A portal that starts when first needed; safe to share between threads."""

    def __init__(self) -> None:
        self._lock = _process.Lock()
        self._stack = ExitStack()
        self._portal: BlockingPortal | None = None
        self._thread: threading.Thread | None = None
        _process.at_exit(_process.ASKING, self.shutdown)
        _process.forget_after_fork(self)

    def portal(self) -> BlockingPortal:
        if _process.ending():
            _process.refuse()
        with self._lock:
            self._forget_a_dead_one()
            if self._portal is None:
                self._portal = self._stack.enter_context(start_blocking_portal(name="tta-sync-bridge"))
                self._thread = self._portal.call(threading.current_thread)
                self._stack.callback(self._portal.call, self._portal.stop, True)
            return self._portal

    def here(self) -> bool:
        """Whether the caller runs on the bridge's own thread, where waiting for the bridge would wait for ever."""
        return self._thread is threading.current_thread()

    def result(self, future: Future[T]) -> T:
        """What a call came to, once it is over.

        Raises:
            EngineError: the loop has ended before it: what ran there called ``sys.exit``, say.
        """
        thread = self._thread
        while True:
            try:
                return future.result(_LOOK_SECONDS)
            except TimeoutError:
                if future.done():
                    return future.result()  # the call's own
                if thread is not None and not thread.is_alive():
                    raise EngineError(
                        "the loop of sync calls was ended by what it ran (sys.exit, say), so this call has no answer; "
                        "the next one starts another loop"
                    ) from None

    def _forget_a_dead_one(self) -> None:
        """A loop that what it ran has ended can neither be asked nor closed any more."""
        if self._thread is not None and not self._thread.is_alive():
            self.after_fork()

    def shutdown(self) -> None:
        with self._lock:
            self._forget_a_dead_one()
            self._portal = None
            self._stack.close()
            self._thread = None

    def after_fork(self) -> None:
        _process.inherit(self._portal, self._stack, *_kept)
        _kept.clear()
        self._stack, self._portal, self._thread = ExitStack(), None, None


_bridge = _Bridge()


class Calls:
    """Sync calls of several threads that one of them may end."""

    def __init__(self) -> None:
        # Written by the threads that call and by the one that ends them; both hold the lock.
        self._lock = threading.Lock()
        self._under_way: set[Future[Any]] = set()
        self._ended = False

    @contextmanager
    def joined(self) -> Generator[None, None, None]:
        """Calls that this context makes meanwhile are among them."""
        token = _calls.set(self)
        try:
            yield
        finally:
            _calls.reset(token)

    def end(self) -> None:
        """Cancel what is under way, and whatever begins later."""
        with self._lock:
            self._ended = True
            under_way = tuple(self._under_way)
        for call in under_way:
            call.cancel()

    def add(self, call: Future[Any]) -> None:
        """Have ``call`` end with the others."""
        with self._lock:
            if not self._ended:
                self._under_way.add(call)
        # Both outside of the lock, which they take where the call is over already.
        call.add_done_callback(self._over)
        if self._ended:
            call.cancel()

    def _over(self, call: Future[Any]) -> None:
        with self._lock:
            self._under_way.discard(call)


_calls: ContextVar[Calls | None] = ContextVar("_calls", default=None)


def here() -> bool:
    """Whether this is the bridge's own thread, where :func:`run` would wait for itself."""
    return _bridge.here()


def run(function: Callable[[], Awaitable[T]]) -> T:
    """Run an async function to its end and return its result; an interrupt of the caller cancels it.

    Raises:
        ConfigurationError: this is called on the bridge's own loop, by an async fallback or callback of a sync call.
    """
    if _bridge.here():
        raise ConfigurationError(
            "a sync call was made from async code that itself answers a sync call, and would wait for itself for ever; "
            "await the async call, such as ainvoke, or let an ordinary function make it"
        )
    return _result(function, _calls.get())


def _result(function: Callable[[], Awaitable[T]], calls: Calls | None = None) -> T:
    future = _bridge.portal().start_task_soon(function)
    try:
        if calls is not None:
            calls.add(future)
        return _bridge.result(future)
    except CancelledError:
        if _process.ending():
            _process.refuse()
        raise
    finally:
        future.cancel()


def iterate(stream: AsyncGenerator[T, None]) -> Generator[T, None, None]:
    """Yield from an async generator; closing the result closes it.

    Raises:
        EngineError: the process was forked since it began.
    """
    process = os.getpid()
    # An interrupt leaves a step behind that is still being cancelled, and a generator that runs cannot be closed.
    turn = asyncio.Lock()

    async def step() -> T | object:
        async with turn:
            return await anext(stream, _END)

    # The collector may find a dropped iterator on any thread. It must not find the stream with it, whose own
    # finaliser would run at the same time.
    _kept.add(stream)
    try:
        while (item := run(step)) is not _END:
            yield item  # type: ignore[misc]
            if process != os.getpid():
                raise EngineError("the process was forked while it read this stream, which is its parent's; ask again")
    finally:
        if _process.ending() or process != os.getpid():
            pass  # closed with its loop, or the parent's
        elif _bridge.here():
            closing = asyncio.ensure_future(settled(partial(_close, stream, turn)))
            _kept.add(closing)
            closing.add_done_callback(_kept.discard)
        else:
            _result(partial(_close, stream, turn))


async def _close(stream: AsyncGenerator[Any, None], turn: asyncio.Lock) -> None:
    try:
        async with turn:
            await stream.aclose()
    finally:
        _kept.discard(stream)


def shutdown() -> None:
    """Stop the bridge's thread and cancel its calls; the next sync call starts a new one."""
    _bridge.shutdown()
