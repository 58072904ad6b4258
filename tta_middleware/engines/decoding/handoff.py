"""Carries results from the decode thread into whichever event loop asked."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

import anyio

from tta_middleware.errors import EngineError
from tta_middleware.types import Completion, GenerationRequest, TextDelta

if TYPE_CHECKING:
    from tta_middleware.engines.decoding.row import Row

Item = TypeVar("Item")


class Mailbox(Generic[Item]):
    """An unbounded queue with one reader in the event loop that made it and a writer in another thread.

    The writer never waits. Errors that are put in are raised at the reader.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: deque[Item | EngineError] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: Item | EngineError) -> bool:
        """Add an item; False if the reader's loop is closed and nobody will read it."""
        self._items.append(item)
        waiting: _Waiting | None = getattr(_together, "waiting", None)
        if waiting is not None:
            waiting.setdefault(self._loop, []).append(self)
            return not self.abandoned
        return _wake_all(self._loop, [self])

    @property
    def abandoned(self) -> bool:
        return self._loop.is_closed()

    async def get(self) -> Item:
        """The next item.

        Raises:
            EngineError: the writer put one in.
        """
        while not self._items:
            self._waiter = self._loop.create_future()
            await self._waiter
        item = self._items.popleft()
        if isinstance(item, EngineError):
            raise item
        return item

    def wake(self) -> None:
        """Let the reader look; called in its loop."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


_Waiting: TypeAlias = dict[asyncio.AbstractEventLoop, list[Mailbox[Any]]]
_together = threading.local()


@contextmanager
def one_call_per_loop() -> Iterator[None]:
    """Wake readers at the end of the block, each loop once: a wake-up per item hands the interpreter to and fro."""
    waiting: _Waiting = {}
    _together.waiting = waiting
    try:
        yield
    finally:
        _together.waiting = None
        for loop, mailboxes in waiting.items():
            _wake_all(loop, mailboxes)


def _wake_all(loop: asyncio.AbstractEventLoop, mailboxes: Sequence[Mailbox[Any]]) -> bool:
    def wake() -> None:
        for mailbox in mailboxes:
            mailbox.wake()

    try:
        loop.call_soon_threadsafe(wake)
    except RuntimeError:
        return False
    return True


class Chore(Generic[Item]):
    """Work for the decode thread beside its passes; made and awaited in one event loop."""

    def __init__(self, work: Callable[[], Item]) -> None:
        self._work = work
        self._mailbox: Mailbox[Item | Exception] = Mailbox()

    def do(self) -> None:
        """Carry it out; called in the decode thread."""
        try:
            self._mailbox.put(self._work())
        except Exception as error:  # noqa: BLE001  raised again where it is awaited
            self._mailbox.put(error)
        except BaseException as error:  # noqa: BLE001  the thread goes on for the others
            self.fail(EngineError(f"work beside decoding failed: {error!r}"))

    def fail(self, error: EngineError) -> None:
        self._mailbox.put(error)

    async def result(self) -> Item:
        """What the work returned.

        Raises:
            Exception: what it raised.
        """
        found = await self._mailbox.get()
        if isinstance(found, Exception):
            raise found
        return found


class StreamSink:
    """Every delta goes to the mailbox."""

    def __init__(self, mailbox: Mailbox[TextDelta]) -> None:
        self._mailbox = mailbox

    def delta(self, delta: TextDelta) -> bool:
        return self._mailbox.put(delta)

    def ended(self, last: TextDelta, completion: Completion) -> None:
        self._mailbox.put(last)

    def failed(self, error: EngineError) -> None:
        self._mailbox.put(error)


class BatchSink:
    """Only the finished completion goes to the mailbox, with its place in the batch."""

    def __init__(self, mailbox: Mailbox[tuple[int, Completion]], index: int) -> None:
        self._mailbox = mailbox
        self._index = index

    def delta(self, delta: TextDelta) -> bool:
        return not self._mailbox.abandoned

    def ended(self, last: TextDelta, completion: Completion) -> None:
        self._mailbox.put((self._index, completion))

    def failed(self, error: EngineError) -> None:
        self._mailbox.put(error)


class ScoreSink(Generic[Item]):
    """What was worked out of one text goes to the mailbox, with its place; or what stood in its way."""

    def __init__(self, mailbox: Mailbox[tuple[int, Item]], index: int) -> None:
        self._mailbox = mailbox
        self._index = index

    def __call__(self, found: Item | BaseException) -> None:
        if not isinstance(found, BaseException):
            self._mailbox.put((self._index, found))
            return
        error = EngineError(str(found) if isinstance(found, EngineError) else f"scoring failed: {found!r}")
        error.__cause__ = found
        self._mailbox.put(error)


class StreamGroup:
    """Streams that join the batch together, begun by whichever is started first."""

    def __init__(
        self,
        begin: Callable[[Sequence[GenerationRequest]], Awaitable[list[tuple[Row, Mailbox[TextDelta]]]]],
        requests: Sequence[GenerationRequest],
    ) -> None:
        self._begin, self._requests = begin, requests
        self._begun: list[tuple[Row, Mailbox[TextDelta]]] | None = None
        self._lock = anyio.Lock()
        self._left: set[int] = set()

    async def stream(self, index: int) -> AsyncGenerator[TextDelta, None]:
        try:
            async with self._lock:
                if self._begun is None:
                    self._begun = await self._begin(self._requests)
                    for left in self._left:
                        self._begun[left][0].cancel()
            _, mailbox = self._begun[index]
            finished = False
            while not finished:
                delta = await mailbox.get()
                finished = delta.finish_reason is not None
                yield delta
        finally:
            # Perhaps before anything has begun, while the model was being loaded, say.
            self._left.add(index)
            if self._begun is not None:
                self._begun[index][0].cancel()
