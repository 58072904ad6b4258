"""Token ids to text, one token at a time, and the cut at stop strings. Pure: no model, no I/O."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from tta_middleware.engines.prompt.thoughts import Piece, ThoughtSplitter
from tta_middleware.types import Channel, FinishReason, TextDelta

Decode: TypeAlias = Callable[[Sequence[int]], str]

# What decoders put for bytes that are no character yet.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


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
        if not fresh or fresh.endswith(REPLACEMENT):
            return ""
        self._window = self._window[self._known :]
        self._known = len(self._window)
        return fresh

    def flush(self) -> str:
        """The rest, without bytes that never became a character."""
        fresh = self._fresh_text().rstrip(REPLACEMENT)
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
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            # The one that is over first ends the answer, as it does where the text comes letter by letter.
            return self._release(min(found)[1])
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
    """Detokeniser, splitter of thoughts and stop filter in a row: ids in, releasable pieces out.

    Stop strings are looked for in the answer alone; a thought that holds one is not the end of it.

    Args:
        marks: by token id, the marks of thoughts that are tokens.
    """

    def __init__(
        self,
        detokeniser: Detokeniser,
        stop: Sequence[str],
        splitter: ThoughtSplitter | None = None,
        marks: Mapping[int, str] | None = None,
    ) -> None:
        self._detokeniser = detokeniser
        self._filter = StopFilter(stop)
        self._splitter, self._marks = splitter or ThoughtSplitter(None), marks or {}

    @property
    def stopped(self) -> bool:
        return self._filter.stopped

    def push(self, token_id: int) -> list[Piece]:
        """What became certain with this id; a mark gives an empty piece of its channel where nothing else did."""
        before = self._splitter.channel
        mark = self._marks.get(token_id)
        if mark is None:
            return self._filtered(self._splitter.text(self._detokeniser.push(token_id))) or _marked(before)
        pieces = [*self._splitter.text(self._detokeniser.flush()), *self._splitter.mark(mark)]
        return self._filtered(pieces) or [("reasoning", "")]

    def flush(self) -> list[Piece]:
        pieces = [*self._splitter.text(self._detokeniser.flush()), *self._splitter.finish()]
        found = self._filtered(pieces)
        if rest := self._filter.flush():
            found.append(("answer", rest))
        return found

    def _filtered(self, pieces: Sequence[Piece]) -> list[Piece]:
        found = [(channel, self._filter.push(text) if channel == "answer" else text) for channel, text in pieces]
        return [(channel, text) for channel, text in found if text]


def _marked(channel: Channel) -> list[Piece]:
    """Tokens of a thought are told as they come, since whoever bounds thoughts counts them."""
    return [("reasoning", "")] if channel == "reasoning" else []


def deltas(pieces: Sequence[Piece], token_ids: Sequence[int], reason: FinishReason | None) -> list[TextDelta]:
    """One delta for each piece, at least one: the ids stand on the first, the reason on the last."""
    found = [TextDelta(text, channel=channel) for channel, text in pieces] or [TextDelta("")]
    found[0] = replace(found[0], token_ids=tuple(token_ids))
    found[-1] = replace(found[-1], finish_reason=reason)
    return found
