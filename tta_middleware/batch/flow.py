"""Answers items side by side and hands the records on in the order that is wanted; memory stays bounded."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import anyio
import anyio.to_thread
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from tta_middleware.batch.input import Item
from tta_middleware.batch.shard import Order
from tta_middleware.files.jsonl import Record

Answer: TypeAlias = Callable[[Item], Awaitable[Record]]
Write: TypeAlias = Callable[[list[Record]], None]
Placed: TypeAlias = tuple[int, Item]
Result: TypeAlias = tuple[int, Record]

WINDOW = 4
"""Items that are read but not written yet, as a multiple of those under way: how far answers may overtake each other
where the input's order is kept."""


@dataclass(slots=True)
class Held:
    """Records on their way out: all at once, or each after its predecessors."""

    order: Order
    _next: int = 0
    _records: dict[int, Record] = field(default_factory=dict)

    def put(self, place: int, record: Record) -> None:
        """Take the record of the item that was read as number ``place``, from 0."""
        self._records[place] = record

    def take(self) -> list[Record]:
        """What may be written now."""
        if self.order is Order.COMPLETED:
            records, self._records = list(self._records.values()), {}
            return records
        records = []
        while self._next in self._records:
            records.append(self._records.pop(self._next))
            self._next += 1
        return records


@dataclass(frozen=True, slots=True)
class Flow:
    """Reads ahead, works, writes: three stages that wait for each other.

    Attributes:
        answer: makes the record of an item; called from ``concurrency`` tasks at once.
        write: puts records where they are safe; called in a worker thread, one call at a time.
        written: told how many were written, in the loop.
    """

    answer: Answer
    write: Write
    written: Callable[[int], None]
    concurrency: int
    order: Order

    async def run(self, items: AsyncIterator[Item]) -> None:
        """Until ``items`` end and everything is written; what one stage raises ends them all."""
        slots = anyio.Semaphore(WINDOW * self.concurrency)
        to_workers, work = anyio.create_memory_object_stream[Placed](0)
        to_writer, results = anyio.create_memory_object_stream[Result](WINDOW * self.concurrency)
        # The results' end stays open until all is over: workers must not see a writer that fails as a broken stream.
        with results:
            async with anyio.create_task_group() as stages:
                stages.start_soon(self._read, items, slots, to_workers)
                with to_writer, work:
                    for _ in range(self.concurrency):
                        stages.start_soon(self._work, work.clone(), to_writer.clone())
                stages.start_soon(self._deliver, results, slots)

    async def _read(
        self, items: AsyncIterator[Item], slots: anyio.Semaphore, to_workers: MemoryObjectSendStream[Placed]
    ) -> None:
        place = 0
        async with to_workers:
            await slots.acquire()
            async for item in items:
                await to_workers.send((place, item))
                place += 1
                await slots.acquire()

    async def _work(self, work: MemoryObjectReceiveStream[Placed], to_writer: MemoryObjectSendStream[Result]) -> None:
        async with work, to_writer:
            async for place, item in work:
                await to_writer.send((place, await self.answer(item)))

    async def _deliver(self, results: MemoryObjectReceiveStream[Result], slots: anyio.Semaphore) -> None:
        """Write together what has gathered while the disk was busy."""
        held = Held(self.order)
        async for place, record in results:
            held.put(place, record)
            for _ in range(results.statistics().current_buffer_used):
                held.put(*results.receive_nowait())
            if ready := held.take():
                await anyio.to_thread.run_sync(partial(self.write, ready))
                self.written(len(ready))
                for _ in ready:
                    slots.release()
