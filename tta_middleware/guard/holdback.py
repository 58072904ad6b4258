"""The sans-IO state machine of a guarded stream: text and verdicts in, actions out.

It upholds the guarantee of docs/concepts.md: every released character was scored below the threshold, as it was written
and as a consumer decodes it, together with the text before it: with ``Windows.context`` characters of it while the
answer goes on, and with all of it in the last check. So that is the bound: a text that is harmful only as a whole, over
more than one window and its context, shows at its end, and what is withheld then is its last part. An answer that is
held to its end (no windows) leaves only after it was scored whole.

Boundaries are counted in characters of the text, never in chunks, so any re-chunking of one text gives the same checks
and releases.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from tta_middleware.call_text import json_reading
from tta_middleware.config import Windows
from tta_middleware.errors import StreamProtocolError

_LONGEST_WORD = 80
"""Text without a gap is held back for so many characters, then released wherever the check ended."""

_IDEOGRAPHS = "\u2e80"
"""From here on Unicode holds mostly scripts that are written without spaces."""


Reading: TypeAlias = Callable[[str, int], str | None]
"""What a consumer reads once it has decoded an answer, from a position on; None where it is all written there so."""


@dataclass(frozen=True, slots=True)
class Check:
    """Score ``text``: the window that ends after ``end`` characters of the answer, and what comes before it.

    ``decoded`` is what is read there besides, which has to be scored as well.
    """

    text: str
    end: int
    decoded: str | None = None


@dataclass(frozen=True, slots=True)
class Release:
    """Hand ``text`` to the consumer."""

    text: str


@dataclass(frozen=True, slots=True)
class End:
    """Everything was checked and released; announce the end."""


@dataclass(frozen=True, slots=True)
class Flagged:
    """A window was flagged: ``released`` is out for good, nothing further of this text may follow it."""

    released: str


Action: TypeAlias = Check | Release | End | Flagged


class HoldBack:
    """One answer's stream.

    Args:
        windows: how the answer is cut; None checks it whole at its end (``release="end"``).
        prefix: what the answer goes on from. It was checked and released before, counts as context, and is never
            released again.
        reading: what consumers make of the answer.
    """

    def __init__(self, windows: Windows | None = None, prefix: str = "", reading: Reading = json_reading) -> None:
        self._windows, self._reading = windows, reading
        self._text = prefix
        self._released = len(prefix)
        self._asked: deque[int] = deque()
        self._last_asked = len(prefix)
        self._whole_asked = False
        self._due = len(prefix)
        self._width = 0
        self._finished = False
        self._closed = False
        self._widen()

    @property
    def held(self) -> int:
        """Characters that have come in and not gone out."""
        return len(self._text) - self._released

    @property
    def full(self) -> bool:
        """So much waits for its check or its consumer that decoding should pause."""
        return self._windows is not None and self.held > self._windows.ahead

    @property
    def released(self) -> str:
        """All that has gone out, the prefix included."""
        return self._text[: self._released]

    def feed(self, text: str) -> list[Action]:
        """More of the answer was decoded."""
        self._require(not self._finished, "text came after the end")
        if self._closed:
            return []
        self._text += text
        self._whole_asked = self._whole_asked and not text
        return self._ask()

    def finish(self) -> list[Action]:
        """Decoding ended; before that is announced the whole answer is checked, prefix included.

        Nothing is asked where the last window was all of it.
        """
        self._require(not self._finished, "the answer ended twice")
        self._finished = True
        if self._closed:
            return []
        if not self._whole_asked:
            return [self._check(len(self._text), whole=True)]
        if self._asked:
            return []
        return [*self._release(len(self._text)), *self._end_if_done()]

    def verdict(self, end: int, *, safe: bool, doubtful: bool = False) -> list[Action]:
        """The oldest open check, of the window that ends at ``end``, was answered.

        Doubtful text is held until a later window is found safe beyond doubt, or the answer has ended.

        Raises:
            StreamProtocolError: verdicts are applied out of order, or none was asked for.
        """
        if self._closed:
            return []
        self._require(bool(self._asked) and self._asked[0] == end, f"no verdict of {end} characters is due")
        self._asked.popleft()
        if not safe:
            self._closed = True
            return [Flagged(self.released)]
        cut = self._released if doubtful else self._gap(end)
        if self._finished and not self._asked:
            cut = end  # of the whole answer; a last window that ends there, too, frees nothing by itself
        return [*self._release(cut), *self._ask(), *self._end_if_done()]

    def _release(self, cut: int) -> list[Action]:
        piece, self._released = self._text[self._released : cut], cut
        return [Release(piece)] if piece else []

    def _ask(self) -> list[Action]:
        """The next checks: one per window, or one for all that waited while too many were open."""
        actions: list[Action] = []
        windows = self._windows
        while windows and not self._finished and self._due <= len(self._text) and len(self._asked) < windows.in_flight:
            end = self._due
            self._widen()
            if len(self._asked) == windows.in_flight - 1:
                while self._due <= len(self._text):
                    end = self._due
                    self._widen()
            actions.append(self._check(end))
        return actions

    def _widen(self) -> None:
        """Where the next window ends: a matter of the text alone, not of chunks or time."""
        if self._windows is not None:
            self._width = min(self._windows.largest, 2 * self._width) or min(self._windows.first, self._windows.largest)
            self._due += self._width

    def _check(self, end: int, *, whole: bool = False) -> Check:
        begin = max(0, self._last_asked - self._windows.context) if self._windows and not whole else 0
        self._asked.append(end)
        self._last_asked = end
        self._whole_asked = begin == 0 and end == len(self._text)
        return Check(self._text[begin:end], end, self._reading(self._text[:end], begin))

    def _gap(self, end: int) -> int:
        """The last gap between two words of the checked text, so that a repair can go on from whole words."""
        for at in range(end - 1, self._released, -1):
            if self._text[at] >= _IDEOGRAPHS or (self._text[at].isspace() and not self._text[at - 1].isspace()):
                return at
        return end if end - self._released >= _LONGEST_WORD else self._released

    def _end_if_done(self) -> list[Action]:
        if self._finished and not self._asked and self._released == len(self._text):
            self._closed = True
            return [End()]
        return []

    @staticmethod
    def _require(condition: bool, problem: str) -> None:
        if not condition:
            raise StreamProtocolError(f"{problem}; the driver of this stream is at fault")
