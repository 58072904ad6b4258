"""The sans-IO state machine of a guarded stream: text and verdicts in, actions out.

It upholds the invariant of DESIGN section 5: every released character belongs to a prefix of the answer that
was scored below the threshold. Boundaries are counted in characters of the text, never in chunks, so any
re-chunking of one text gives the same checks and releases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from tta_middleware.errors import ConfigurationError, StreamProtocolError


@dataclass(frozen=True, slots=True)
class Check:
    """Score the answer's first ``end`` characters, given as ``text``."""

    text: str
    end: int


@dataclass(frozen=True, slots=True)
class Release:
    """Hand ``text`` to the consumer."""

    text: str


@dataclass(frozen=True, slots=True)
class End:
    """Everything was checked and released; announce the end."""


@dataclass(frozen=True, slots=True)
class Flagged:
    """A prefix was flagged: ``released`` is out for good, nothing further of this text may follow it."""

    released: str


Action: TypeAlias = Check | Release | End | Flagged


class HoldBack:
    """One answer's stream.

    Args:
        window: characters between two checks; None checks the whole answer at its end (``release="end"``).

    Raises:
        ConfigurationError: ``window`` is below 1.
    """

    def __init__(self, window: int | None = None) -> None:
        if window is not None and window < 1:
            raise ConfigurationError(f"a release window has at least one character, not {window}")
        self._window = window
        self._text = ""
        self._asked: list[int] = []
        self._next_end = window
        self._released = 0
        self._finished = False
        self._closed = False

    def feed(self, text: str) -> list[Action]:
        """More of the answer was decoded."""
        self._require(not self._finished, "text came after the end")
        if self._closed:
            return []
        self._text += text
        actions: list[Action] = []
        while self._window and self._next_end is not None and self._next_end <= len(self._text):
            actions.append(self._check(self._next_end))
            self._next_end += self._window
        return actions

    def finish(self) -> list[Action]:
        """Decoding ended; the last, short window is checked before the end is announced."""
        self._require(not self._finished, "the answer ended twice")
        self._finished = True
        if self._closed:
            return []
        last = self._asked[-1] if self._asked else self._released
        if last < len(self._text) or not self._text:
            return [self._check(len(self._text))]
        return self._end_if_done()

    def verdict(self, end: int, *, safe: bool) -> list[Action]:
        """The oldest open check, of the first ``end`` characters, was answered.

        Raises:
            StreamProtocolError: verdicts are applied out of order, or none was asked for.
        """
        if self._closed:
            return []
        self._require(bool(self._asked) and self._asked[0] == end, f"no verdict of {end} characters is due")
        self._asked.pop(0)
        if not safe:
            self._closed = True
            return [Flagged(self._text[: self._released])]
        piece, self._released = self._text[self._released : end], end
        release: list[Action] = [Release(piece)] if piece else []
        return release + self._end_if_done()

    def _check(self, end: int) -> Check:
        self._asked.append(end)
        return Check(self._text[:end], end)

    def _end_if_done(self) -> list[Action]:
        if self._finished and not self._asked and self._released == len(self._text):
            self._closed = True
            return [End()]
        return []

    @staticmethod
    def _require(condition: bool, problem: str) -> None:
        if not condition:
            raise StreamProtocolError(f"{problem}; the driver of this stream is at fault")
