"""What lives as long as the process: how it ends with the interpreter, and what a forked child does with its copy.

Threads do not survive a fork, but what they held does: locks that nobody will release, event loops that nobody runs,
sockets that the parent goes on using. Whoever keeps such a thing registers with :func:`forget_after_fork`.

At exit Python stops threads that still run wherever they are, which kills the process where that is inside torch.
So threads that calculate are stopped before, in stages: first those that ask, then those that answer.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import anyio.to_thread

from tta_middleware.errors import EngineError

T = TypeVar("T")

ASKING, ANSWERING = 0, 1
"""Stages of the end: event loops with calls under way, then the threads that decode for them."""


class Forkable(Protocol):
    """Something that a forked child must not use as it is."""

    def after_fork(self) -> None:
        """Forget what belonged to the parent; called in the child, whose only thread calls it."""


class Lock:
    """A lock that is free in a forked child, whoever held it in the parent."""

    __slots__ = ("__weakref__", "_lock")

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of what it guards has a lock of its own."""
        return Lock, ()

    def __init__(self) -> None:
        self._lock = threading.Lock()
        forget_after_fork(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def locked(self) -> bool:
        return self._lock.locked()

    def after_fork(self) -> None:
        self._lock = threading.Lock()


class _Busy:
    """Calculations under way on threads that are not ours; the interpreter waits for them and begins no others.

    Attributes:
        ended: written once, by the thread that ends the interpreter, and read by all.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = 0
        self.ended = False

    @contextmanager
    def one(self) -> Iterator[None]:
        with self._changed:
            if self.ended:
                refuse()
            self._count += 1
        try:
            yield
        finally:
            with self._changed:
                self._count -= 1
                self._changed.notify_all()

    def end(self) -> None:
        with self._changed:
            self.ended = True
            self._changed.wait_for(lambda: self._count == 0)

    def after_fork(self) -> None:
        self._changed, self._count = threading.Condition(), 0


_busy = _Busy()
_ending = threading.Event()
_endings: list[tuple[int, weakref.WeakMethod[Callable[[], object]]]] = []
_forkable: weakref.WeakSet[Any] = weakref.WeakSet()
_inherited: list[object] = []


def forget_after_fork(owner: Forkable) -> None:
    """Have ``owner.after_fork()`` called in every forked child, for as long as it lives."""
    _forkable.add(owner)


def inherit(*things: object) -> None:
    """Keep what a child got from its parent's loops and never uses: collecting it would touch sockets they share."""
    _inherited.extend(things)


def at_exit(stage: int, stop: Callable[[], object]) -> None:
    """Have the bound method ``stop`` called when the interpreter ends, if its object still lives."""
    _endings.append((stage, weakref.WeakMethod(stop)))
    if len(_endings) % 64 == 0:
        _endings[:] = [ending for ending in _endings if ending[1]() is not None]


def ending() -> bool:
    """Whether the interpreter ends: who asks is stopped, or will be at once, and nobody may ask for more."""
    return _ending.is_set()


def ended() -> bool:
    """Whether nothing is calculated any more, since nobody of ours asks."""
    return _busy.ended


def refuse() -> None:
    """Turn away a call that comes after the end.

    A daemon thread is left where it is, as Python leaves it: it would only report an error that nobody has made.

    Raises:
        EngineError: the caller is no daemon thread.
    """
    if threading.current_thread().daemon:
        threading.Event().wait()
    raise EngineError("the interpreter is shutting down; answer before the program ends")


async def calculate(work: Callable[..., T], *arguments: Any) -> T:
    """Do ``work`` in a worker thread; the interpreter waits for it at its end.

    The workers of an event loop are daemons where the loop's own thread is one.
    """

    def tracked() -> T:
        with _busy.one():
            return work(*arguments)

    return await anyio.to_thread.run_sync(tracked)


def _end() -> None:
    _ending.set()
    _stop(ASKING)
    # Only now: a call that is being cancelled may still have to calculate.
    _busy.end()
    _stop(ANSWERING)


def _stop(stage: int) -> None:
    for stop in [method() for at, method in _endings if at == stage]:
        if stop is not None:
            stop()


def _forked() -> None:
    _busy.after_fork()
    for owner in list(_forkable):
        owner.after_fork()


atexit.register(_end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
