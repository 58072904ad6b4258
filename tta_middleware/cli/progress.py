"""Progress on stderr: a bar in a terminal, else a plain line from time to time."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from tta_middleware.cli.output import note

EVERY = 30.0
"""Seconds between two plain lines."""

Advance: TypeAlias = Callable[[str], None]


@contextmanager
def progress(title: str, done: int, total: int) -> Iterator[Advance]:
    """Gives a function that counts one more as done and takes a word on how it stands."""
    if sys.stderr.isatty():
        with _bar(title, done, total) as advance:
            yield advance
    else:
        yield PlainLines(title, done, total).advance


@contextmanager
def resumable() -> Iterator[None]:
    """On Ctrl-C says that the work so far is not lost."""
    try:
        yield
    except KeyboardInterrupt:
        note("what is done is kept; run the same command again to go on")
        raise


class PlainLines:
    """At most one line in :data:`EVERY` seconds, for log files."""

    def __init__(
        self,
        title: str,
        done: int,
        total: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        write: Callable[[str], None] = note,
    ) -> None:
        self._title, self._done, self._total = title, done, total
        self._clock, self._write = clock, write
        self._last = clock()

    def advance(self, word: str) -> None:
        self._done += 1
        if self._clock() - self._last >= EVERY:
            self._last = self._clock()
            self._write(f"{self._title}: {self._done} of {self._total}, {word}")


@contextmanager
def _bar(title: str, done: int, total: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(title, markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[word]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total, completed=done, word="")
        yield lambda word: bar.update(task, advance=1, word=word)
