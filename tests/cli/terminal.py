"""A program in a terminal of its own, as a person would see it."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Mapping, Sequence

import pyte

LIMIT = 60.0
ROWS, COLUMNS = 200, 110
PROMPT = "you>"


class Terminal:
    """A program behind a pseudo-terminal, and its screen.

    Args:
        instead: codes that the screen does not know, and those that it is given instead.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], *, instead: Mapping[str, str] | None = None
    ) -> None:
        self.instead = instead or {}
        self._end, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        self.process = subprocess.Popen(
            command,
            stdin=inner,
            stdout=inner,
            stderr=inner,
            env={**os.environ, "TERM": "xterm", **environment},
            start_new_session=True,
            preexec_fn=_own_terminal,
        )
        os.close(inner)
        self.raw = b""
        self._screen = pyte.Screen(COLUMNS, ROWS)
        self._screen.write_process_input = self.type  # type: ignore[method-assign]
        self._stream = pyte.ByteStream(self._screen)

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self._screen.display]

    @property
    def row(self) -> int:
        return int(self._screen.cursor.y)

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def tell(self, text: str) -> str:
        """Type a line; what stands between it and the next prompt."""
        begin = self.row
        self.type(text + "\r")
        return self.prompted(begin + 1)

    def prompted(self, begin: int = 0) -> str:
        """Wait for a prompt in that row or below; what stands above it."""
        self.wait(lambda: self.row >= begin and self.lines[self.row] == PROMPT)
        return " ".join(self.lines[begin : self.row])

    def wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LIMIT
        while not condition():
            assert time.monotonic() < deadline, self.lines[: self.row + 1]
            assert self._read(), self.lines[: self.row + 1]

    def rows_in(self, colour: str) -> set[int]:
        """The rows that have a letter of that colour."""
        buffer = self._screen.buffer
        return {row for row, line in buffer.items() if any(cell.fg == colour for cell in line.values())}

    def shows(self, words: str) -> bool:
        return any(words in line for line in self.lines)

    def _read(self) -> bool:
        if not select.select([self._end], [], [], 1.0)[0]:
            return True
        try:
            piece = os.read(self._end, 65536)
        except OSError:  # Linux says so when the program's side is closed
            return False
        self.raw += piece
        for code, other in self.instead.items():
            piece = piece.replace(code.encode(), other.encode())
        self._stream.feed(piece)
        return bool(piece)

    def ended(self) -> int:
        while self._read():
            pass
        return self.process.wait(LIMIT)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._end)


def _own_terminal() -> None:
    """The terminal is the one that Ctrl-C of this process comes from."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
