"""Answers a stream of prompts, one output object per input line."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager, aclosing, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import anyio

from tta_middleware.assembly import AnswerSettings, opened
from tta_middleware.batch.exit_codes import unwrapped
from tta_middleware.batch.flow import Flow
from tta_middleware.batch.input import Item, Source
from tta_middleware.batch.progress import Advance, progress, resumable
from tta_middleware.batch.records import as_batch_record, as_error
from tta_middleware.batch.shard import STDIO, Order, Shard
from tta_middleware.batch.standard import emit, note
from tta_middleware.batch.tally import Tally
from tta_middleware.batch.target import Output, output_to
from tta_middleware.cli.output import loaded
from tta_middleware.errors import ConfigurationError, DataError
from tta_middleware.files.jsonl import Record, dump
from tta_middleware.files.prompts import note_id
from tta_middleware.guard.guard import Guard
from tta_middleware.protocols import Engine

SIDE_BY_SIDE = 32
"""Prompts under way at once where the engine does not say how many it decodes side by side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRequest:
    """What was asked for."""

    source: str
    target: str
    answering: AnswerSettings
    concurrency: int | None
    order: Order
    shard: Shard
    retry_errors: bool
    as_json: bool


def run_batch(request: BatchRequest) -> Tally:
    """Answer what has no output yet and add it to the target.

    Raises:
        DataError: an id comes twice, the target holds something else, or the input breaks off.
        ConfigurationError: a file cannot be opened, or another process writes to the target.
        OSError: the output cannot be written any more.
    """
    _refuse_same_file(request.source, request.target)
    with output_to(request.target, retry_errors=request.retry_errors) as output:
        batch = _Batch(request, Source(request.source, request.answering.sampling), output)
        try:
            with resumable() if output.lasting else nullcontext():
                anyio.run(batch.run)
        except BaseExceptionGroup as errors:
            raise unwrapped(errors) from None
    _tell(batch.tally, output, as_json=request.as_json)
    return batch.tally


@dataclass(slots=True)
class _Batch:
    request: BatchRequest
    source: Source
    output: Output
    tally: Tally = field(default_factory=Tally)
    fault: DataError | None = None

    async def run(self) -> None:
        self.source.check_there()
        skipped, total = await self._survey() if self.source.rereadable else (0, None)
        self.output.open()
        answering = self.request.answering
        async with opened(answering, answering.moderator, loaded=loaded) as parts:
            engine, moderator = parts
            with self._progress(skipped, total) as advance:
                flow = self._flow(engine, answering.guard_over(engine, moderator), advance)
                async with aclosing(self._open_items()) as items:
                    await flow.run(items)
        if self.fault is not None:
            raise self.fault
        self._refuse_nothing()

    def _progress(self, skipped: int, total: int | None) -> AbstractContextManager[Advance]:
        """A bar, or lines for a log; nothing where it would stand between the answers in a terminal."""
        if self.request.target == STDIO and sys.stdout.isatty():
            return nullcontext(_silent)
        return progress("batch", skipped, total)

    async def _survey(self) -> tuple[int, int]:
        """Look through a file before any work: how many of the lines are done, and how many there are."""
        ids: dict[str, int] = {}
        done = total = 0
        async with aclosing(self.source.items(Shard())) as items:
            async for item in items:
                if item.prompt is not None:
                    note_id(ids, item.prompt.id, item.number, item.where)
                if self.request.shard.holds(item.number):
                    total, done = total + 1, done + self._is_done(item)
        self._refuse_nothing()
        return done, total

    async def _open_items(self) -> AsyncGenerator[Item, None]:
        """What is left to do. If the input breaks off, that is told when the lines before are answered."""
        ids: dict[str, int] = {}
        try:
            async with aclosing(self.source.items(self.request.shard)) as items:
                async for item in items:
                    item = self._checked(item, ids)
                    if self._is_done(item):
                        self.tally.skip(item, self.output.done)
                    else:
                        yield item
        except DataError as error:
            self.fault = error

    def _checked(self, item: Item, ids: dict[str, int]) -> Item:
        """A pipe cannot be looked through before, so an id that comes twice is found on the way."""
        if item.prompt is None or self.source.rereadable:
            return item
        try:
            note_id(ids, item.prompt.id, item.number, item.where)
            self._is_done(item)
        except DataError as error:
            return replace(item, prompt=None, error=error)
        return item

    def _is_done(self, item: Item) -> bool:
        return self.output.done.holds(item, self.output.name)

    def _flow(self, engine: Engine, guard: Guard, advance: Advance) -> Flow:
        def written(count: int) -> None:
            for _ in range(count):
                advance(str(self.tally))

        concurrency = self.request.concurrency or getattr(engine, "max_batch", None) or SIDE_BY_SIDE
        return Flow(partial(self._answer, guard), self.output.write, written, concurrency, self.request.order)

    async def _answer(self, guard: Guard, item: Item) -> Record:
        if item.prompt is None:
            self.tally["broken"] += 1
            return {"id": None, "line": item.number, **as_error(item.error)}
        head = {"id": item.prompt.id, "input_hash": item.digest}
        try:
            answer = await guard.answer(item.prompt.messages, item.sampling)
        except Exception as error:  # noqa: BLE001 - the record's boundary: whatever one prompt does, the others go on
            self.tally["failed"] += 1
            return {**head, **as_error(unwrapped(error))}
        record = as_batch_record(answer)
        self.tally["failed" if "error" in record else answer.trace.outcome] += 1
        return {**head, **record}

    def _refuse_nothing(self) -> None:
        if not self.source.lines_seen:
            raise ConfigurationError(
                f"{self.source.name} holds no prompt; one JSON object a line with 'prompt' or 'messages' is needed"
            )


def _silent(_word: str) -> None:
    """No progress."""


def _refuse_same_file(source: str, target: str) -> None:
    here, there = Path(source), Path(target)
    if STDIO not in (source, target) and here.is_file() and there.exists() and here.samefile(there):
        raise ConfigurationError("input and output are the same file")


def _tell(tally: Tally, output: Output, *, as_json: bool) -> None:
    """The summary on stdout for machines, unless the answers go there."""
    if as_json:
        summary = {"output": output.name, **tally}
        note(dump(summary)) if output.name == "stdout" else emit(summary)
    else:
        note(f"{output.name}: {tally}")
