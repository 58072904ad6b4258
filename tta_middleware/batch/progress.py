"""Progress on stderr: a bar in a terminal, else a plain line from time to time."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeAlias

from tta_middleware.batch.standard import note

EVERY = 30.0
"""Seconds between two plain lines."""

_RECENT = 200

Advance: TypeAlias = Callable[[str], None]


@contextmanager
def progress(title: str, done: int, total: int | None) -> Iterator[Advance]:
    """Gives a function that counts one more as done and takes a word on how it stands; None: the end is not known."""
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


class Pace:
    """How fast it goes, by the last :data:`_RECENT` of what was done, and how long it will take."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._times = deque([clock()], maxlen=_RECENT + 1)

    def tick(self) -> None:
        """One more is done."""
        self._times.append(self._clock())

    def words(self, left: int | None) -> str:
        """Such as ``1.8/s, 0:02:10 left``; nothing before the first is done."""
        seconds = self._times[-1] - self._times[0]
        if seconds <= 0.0:
            return ""
        rate = (len(self._times) - 1) / seconds
        speed = f"{rate:.1f}/s" if rate >= 1.0 else f"{rate * 60:.1f}/min"
        return speed if left is None else f"{speed}, {timedelta(seconds=round(left / rate))} left"


class PlainLines:
    """At most one line in :data:`EVERY` seconds, for log files."""

    def __init__(
        self,
        title: str,
        done: int,
        total: int | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        write: Callable[[str], None] = note,
    ) -> None:
        self._title, self._done, self._total = title, done, total
        self._clock, self._write = clock, write
        self._last = clock()
        self._pace = Pace(clock)

    def advance(self, word: str) -> None:
        self._done += 1
        self._pace.tick()
        if self._clock() - self._last >= EVERY:
            self._last = self._clock()
            left = None if self._total is None else self._total - self._done
            count = f"{self._done}" if self._total is None else f"{self._done} of {self._total}"
            self._write(f"{self._title}: " + ", ".join(filter(None, [count, self._pace.words(left), word])))


@contextmanager
def _bar(title: str, done: int, total: int | None) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn(title, markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[pace]}", markup=False),
        TextColumn("{task.fields[word]}", markup=False),
    )
    pace = Pace()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total, completed=done, word="", pace="")

        def advance(word: str) -> None:
            nonlocal done
            done += 1
            pace.tick()
            bar.update(task, advance=1, word=word, pace=pace.words(None if total is None else total - done))

        yield advance
