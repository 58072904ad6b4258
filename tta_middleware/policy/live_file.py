"""A file that is read anew when it changes: named policies, and a server's keys."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from tta_middleware.aio import process as _process
from tta_middleware.errors import ConfigurationError

T = TypeVar("T")

SETTLING = 0.5
"""Seconds since its last change in which a file may still be on its way to the disk."""

_logger = logging.getLogger(__name__)


class LiveFile(Generic[T]):
    """What a file says, up to date.

    Every call reads the file, some tens of microseconds for a small one on a local disk, so the first call after a
    change has it whatever the file system's clock says. A change takes effect as a whole. A file that cannot be read
    or is not valid leaves what it last said in force; :attr:`problem` and a warning in the log say so, and the
    next call tries again. So does one that looks half-written: changed within the last half second, and it differs
    between two reads, lacks the end of its last line or something that there was.

    Args:
        what: what the log calls its content.
        parse: content to meaning; raises ConfigurationError.
        names: what a meaning defines; a file that lacks some of it may not be whole.
        clock: the time of day in seconds, as the file system has it; for tests.

    Attributes:
        problem: what is wrong with the file as it is now; None when it is in force.

    Raises:
        ConfigurationError: the file is unusable from the start.
    """

    def __init__(
        self,
        path: Path,
        what: str,
        parse: Callable[[Path, bytes], T],
        names: Callable[[T], frozenset[str]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path = path
        self.problem: str | None = None
        self._what, self._parse, self._names, self._clock = what, parse, names, clock
        # The lock's holder alone reads the file and writes what follows; `get` takes one whole meaning without it.
        self._lock = _process.Lock()
        self._content = _read(self.path)
        self._refused: bytes | None = None
        self._meaning = parse(self.path, self._content)

    def get(self) -> T:
        """What the file says now, or said when it last was in order."""
        self._refresh()
        return self._meaning

    def _refresh(self) -> None:
        with self._lock:
            try:
                content = _read(self.path)
                if content == self._content:
                    self._refused = self.problem = None
                elif content != self._refused:
                    self._consider(content)
            except ConfigurationError as error:
                self._keep(str(error))

    def _consider(self, content: bytes) -> None:
        try:
            meaning = self._parse(self.path, content)
        except ConfigurationError:
            self._refused = content
            raise
        if self._is_whole(content, meaning):
            self._content, self._meaning = content, meaning
            self._refused = self.problem = None
            _logger.info("%s read from %s", self._what, self.path.name)

    def _is_whole(self, content: bytes, meaning: T) -> bool:
        if abs(self._clock() - _modified(self.path)) >= SETTLING:
            return True
        if _read(self.path) != content:
            return False
        return content.endswith(b"\n") and self._names(meaning) >= self._names(self._meaning)

    def _keep(self, problem: str) -> None:
        if problem != self.problem:
            _logger.warning("%s unchanged, the last good ones stay in force: %s", self._what, problem)
        self.problem = problem


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(f"cannot read {path.name}: {error.strerror}")
