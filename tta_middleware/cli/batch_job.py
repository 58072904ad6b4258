"""Answers a file of prompts, one output object per input line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TextIO, TypeAlias

import anyio

from tta_middleware.cli.failures import describe
from tta_middleware.cli.narrate import as_record
from tta_middleware.cli.output import emit, note
from tta_middleware.cli.parts import Answering
from tta_middleware.cli.progress import Advance, progress, resumable
from tta_middleware.errors import ConfigurationError, DataError, EmptyPromptError, EngineError, TTAError
from tta_middleware.evaluation.datasets import Prompt, note_id, parse_prompt
from tta_middleware.evaluation.jsonl import Record, dump, lines, parse_object, recover
from tta_middleware.guard import Guard
from tta_middleware.types import Sampling

Key: TypeAlias = tuple[str, str]


@dataclass(slots=True)
class Tally:
    """How the records of this run ended."""

    outcomes: Counter[str] = field(default_factory=Counter)
    broken: int = 0
    failed: int = 0
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class _Item:
    """One input line: a prompt, or why there is none."""

    number: int
    prompt: Prompt | None
    error: DataError | None

    @property
    def key(self) -> Key:
        """What the output line is known by; a broken line has no id, so its number stands in."""
        return ("line", str(self.number)) if self.prompt is None else ("id", str(self.prompt.id))


def run_batch(answering: Answering, source: Path, target: Path, concurrency: int, *, as_json: bool) -> Tally:
    """Answer what has no output yet and append it to ``target``.

    Raises:
        DataError: an id comes twice, or ``target`` holds something else.
        ConfigurationError: a file cannot be opened.
    """
    total = _check(source, target)
    done = {_key_of(record) for record in recover(target)}
    tally = Tally()
    with resumable(), _appending(target) as file, progress("batch", 0, total) as advance:
        job = _Job(answering, concurrency, file, advance, tally)
        anyio.run(partial(job.run, _open_items(source, done, tally, advance)))
    _tell(tally, target, as_json=as_json)
    return tally


def _check(source: Path, target: Path) -> int:
    """Count the input's lines and see that ids are unique before any work is done."""
    if target.exists() and source.exists() and target.samefile(source):
        raise ConfigurationError("input and output are the same file")
    seen: dict[str, int] = {}
    total = 0
    for item in _items(source):
        total += 1
        if item.prompt is not None:
            note_id(seen, item.prompt.id, item.number, f"{source}:{item.number}")
    if not total:
        raise ConfigurationError(
            f"{source} holds no prompt; one JSON object a line with 'prompt' or 'messages' is needed"
        )
    return total


def _items(source: Path) -> Iterator[_Item]:
    for number, raw in lines(source):
        where = f"{source}:{number}"
        try:
            yield _Item(number, parse_prompt(parse_object(raw, where), number, where), None)
        except DataError as error:
            yield _Item(number, None, error)


def _open_items(source: Path, done: set[Key], tally: Tally, advance: Advance) -> Iterator[_Item]:
    for item in _items(source):
        if item.key in done:
            tally.skipped += 1
            advance("")
        else:
            yield item


def _key_of(record: Record) -> Key:
    return ("line", str(record["line"])) if "line" in record else ("id", str(record.get("id")))


def _appending(target: Path) -> TextIO:
    try:
        return target.open("a", encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"cannot write to {target}: {error.strerror}") from None


@dataclass(frozen=True, slots=True)
class _Job:
    answering: Answering
    concurrency: int
    file: TextIO
    advance: Advance
    tally: Tally

    async def run(self, items: Iterator[_Item]) -> None:
        """As many workers as prompts may be under way, all taking from one iterator: memory stays bounded."""
        async with self.answering.guard() as guard, anyio.create_task_group() as workers:
            for _ in range(self.concurrency):
                workers.start_soon(self._work, items, guard)

    async def _work(self, items: Iterator[_Item], guard: Guard) -> None:
        for item in items:
            record = await self._answer(item, guard, self.answering.sampling)
            self.file.write(dump(record) + "\n")
            self.file.flush()
            self.advance(", ".join(f"{count} {name}" for name, count in self.tally.outcomes.items()))

    async def _answer(self, item: _Item, guard: Guard, sampling: Sampling) -> Record:
        if item.prompt is None:
            self.tally.broken += 1
            return {"id": None, "line": item.number, **_error(item.error)}
        try:
            answer = await guard.answer(item.prompt.messages, sampling)
        except (EmptyPromptError, EngineError) as error:
            self.tally.failed += 1
            return {"id": item.prompt.id, **_error(error)}
        self.tally.outcomes[answer.trace.outcome] += 1
        return {"id": item.prompt.id, **as_record(answer)}


def _error(error: TTAError | None) -> Record:
    kind, message = describe(error or DataError("the line cannot be read"))
    return {"error": {"type": kind, "message": message}}


def _tell(tally: Tally, target: Path, *, as_json: bool) -> None:
    counts = {**tally.outcomes, "failed": tally.failed, "broken": tally.broken, "skipped": tally.skipped}
    if as_json:
        emit({"output": str(target), **counts})
    else:
        note(f"{target}: " + ", ".join(f"{count} {name}" for name, count in counts.items() if count))
