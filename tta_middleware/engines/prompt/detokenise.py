"""Token ids to text, one token at a time, and the cut at stop strings. Pure: no model, no I/O."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TypeAlias

Decode: TypeAlias = Callable[[Sequence[int]], str]

# What decoders put for bytes that are no character yet.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokeniser:
    """Turns ids into text that never ends inside a multi-byte character.

    Each new id is decoded together with a few ids before it, because what an id reads as can depend on its
    left neighbour: SentencePiece drops the first space, an emoji takes several byte tokens.

    Args:
        decode: ids to text.
        skip: ids that give no text (special tokens).
        context: the prompt's last ids, so that a continuation keeps its leading space.
    """

    def __init__(self, decode: Decode, *, skip: Collection[int] = (), context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._skip = skip
        self._window = list(context)
        self._known = len(self._window)

    def push(self, token_id: int) -> str:
        """The text that became certain with this id; often empty, never part of a character."""
        if token_id in self._skip:
            return ""
        self._window.append(token_id)
        fresh = self._fresh_text()
        if not fresh or fresh.endswith(_REPLACEMENT):
            return ""
        self._window = self._window[self._known :]
        self._known = len(self._window)
        return fresh

    def flush(self) -> str:
        """The rest, without bytes that never became a character."""
        fresh = self._fresh_text().rstrip(_REPLACEMENT)
        self._window, self._known = [], 0
        return fresh

    def _fresh_text(self) -> str:
        before = self._decode(self._window[: self._known]) if self._known else ""
        return self._decode(self._window)[len(before) :]


class StopFilter:
    """Cuts a growing text before the first stop string; never lets a part of one out."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that can be released; nothing more once :attr:`stopped`."""
        if self.stopped:
            return ""
        self._held += text
        found = [at for at in map(self._held.find, self._stop) if at >= 0]
        if found:
            self.stopped = True
            return self._release(min(found))
        return self._release(len(self._held) - self._partial())

    def flush(self) -> str:
        """What was held for the sake of a stop string that did not come."""
        return "" if self.stopped else self._release(len(self._held))

    def _release(self, length: int) -> str:
        released, self._held = self._held[:length], self._held[length:]
        return released

    def _partial(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stop):
                return size
        return 0


class TextAssembler:
    """Detokeniser and stop filter in a row: ids in, releasable text out."""

    def __init__(self, detokeniser: Detokeniser, stop: Sequence[str]) -> None:
        self._detokeniser = detokeniser
        self._filter = StopFilter(stop)

    @property
    def stopped(self) -> bool:
        return self._filter.stopped

    def push(self, token_id: int) -> str:
        return self._filter.push(self._detokeniser.push(token_id))

    def flush(self) -> str:
        return self._filter.push(self._detokeniser.flush()) + self._filter.flush()
