"""Cuts a stream of bytes into numbered lines, as many at a time as have arrived."""

from __future__ import annotations

from collections.abc import Callable, Iterator

LONGEST = 8 * 1024 * 1024
"""Bytes of the longest line that is read; a longer one is reported and skipped."""

_READ = 65536


class Lines:
    """Feed bytes, get finished lines; a line longer than ``longest`` bytes comes as None."""

    def __init__(self, longest: int = LONGEST) -> None:
        self._longest = longest
        self._pending = bytearray()
        self._too_long = False
        self._number = 0

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes | None]]:
        """The lines that ``data`` finishes, blank ones left out."""
        *ends, rest = data.split(b"\n")
        for piece in ends:
            self._keep(piece)
            yield from self._line()
        self._keep(rest)

    def finish(self) -> Iterator[tuple[int, bytes | None]]:
        """The last line, if nothing ended it."""
        if self._pending or self._too_long:
            yield from self._line()

    def _keep(self, piece: bytes) -> None:
        self._too_long = self._too_long or len(self._pending) + len(piece) > self._longest
        if self._too_long:
            self._pending.clear()
        else:
            self._pending += piece

    def _line(self) -> Iterator[tuple[int, bytes | None]]:
        line, too_long = bytes(self._pending), self._too_long
        self._pending.clear()
        self._too_long = False
        self._number += 1
        if too_long or line.strip():
            yield self._number, None if too_long else line


def batches(read: Callable[[int], bytes], size: int) -> Iterator[list[tuple[int, bytes | None]]]:
    """Lists of at most ``size`` lines; ``read(n)`` gives at most n bytes that are there, none at the end.

    What has arrived is given out before more is waited for, so a slow pipe gets its answers line by line.
    """
    lines = Lines()
    while data := read(_READ):
        yield from _groups(list(lines.feed(data)), size)
    yield from _groups(list(lines.finish()), size)


def _groups(lines: list[tuple[int, bytes | None]], size: int) -> Iterator[list[tuple[int, bytes | None]]]:
    for start in range(0, len(lines), size):
        yield lines[start : start + size]
