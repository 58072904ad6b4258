"""A foreign model's message chunks, cut into windows that are checked while it goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field

from langchain_core.messages import AIMessage, AIMessageChunk

from tta_langchain_agents.content import Text, held_material, own_id, tail_material, take_apart
from tta_middleware.config import Windows
from tta_middleware.errors import FlaggedError, ModerationError
from tta_middleware.guard.ledger import Ledger
from tta_middleware.guard.moderated import moderated


class WithheldError(Exception):
    """The rest of a message may not be shown; ``part`` is the part of it that was flagged."""

    def __init__(self, part: str) -> None:
        super().__init__(part)
        self.part = part


@dataclass(slots=True)
class Track:
    """The chunks that came in, in order, so that checked text leaves in the shape in which it came.

    Text is a queue of pieces. Tool calls and other blocks lie between the pieces; those that follow one another are one
    item.
    """

    id: str | None = None
    tail: AIMessageChunk = field(default_factory=lambda: AIMessageChunk(content=""))
    _items: deque[Text | AIMessageChunk] = field(default_factory=deque)

    def add(self, chunk: AIMessage) -> str:
        """Takes a chunk in; returns its text."""
        taken = take_apart(chunk)
        self.id = self.id or own_id(chunk.id)
        self.tail = self.tail + taken.tail
        self._items += taken.texts
        if taken.held is not None:
            last = self._items.pop() if self._items and isinstance(self._items[-1], AIMessageChunk) else None
            self._items.append(taken.held if last is None else last + taken.held)  # type: ignore[operator]
        return "".join(text.text for text in taken.texts)

    def take(self, count: int) -> Iterator[Text | AIMessageChunk]:
        """The next ``count`` characters of text and what lies between them."""
        while count > 0:
            item = self._items.popleft()
            if isinstance(item, Text) and len(item.text) > count:
                item, later = item.split(count)
                self._items.appendleft(later)
            count -= len(item.text) if isinstance(item, Text) else 0
            yield item

    def rest(self) -> Iterator[Text | AIMessageChunk]:
        """What is left when all text was taken."""
        while self._items:
            yield self._items.popleft()


@dataclass(slots=True)
class WatchedStream:
    """One message on its way from the model to the consumer.

    Attributes:
        windows: None holds the text until all of it was checked.
        spoken: the text of the answer that has left.
    """

    ledger: Ledger
    windows: Windows | None
    prompt: str | None
    track: Track = field(default_factory=Track)
    spoken: str = ""
    _reasoned: str = ""
    _held: AIMessageChunk | None = None

    async def run(self, chunks: AsyncGenerator[AIMessage, None]) -> AsyncGenerator[AIMessageChunk, None]:
        """The chunks that may be shown, the message's metadata excepted; see ``track.tail``.

        Raises:
            WithheldError: something was flagged or could not be scored; nothing of it was yielded.
        """
        texts, hold = self._texts(chunks), self.windows is None
        checked = moderated(texts, self.ledger, self.ledger.policy, windows=self.windows, hold=hold, prompt=self.prompt)
        try:
            async with aclosing(checked) as pieces:
                async for piece in pieces:
                    for item in self.track.take(len(piece)):
                        yield await self._release(item)
        except (FlaggedError, ModerationError):
            raise WithheldError("text") from None
        for item in self.track.rest():
            yield await self._release(item)
        for part, text in tail_material(self.track.tail):
            await self._check(part, text)
        self.ledger.approved |= {self.spoken, self._reasoned}

    async def _texts(self, chunks: AsyncGenerator[AIMessage, None]) -> AsyncGenerator[str, None]:
        async with aclosing(chunks):
            async for chunk in chunks:
                if text := self.track.add(chunk):
                    yield text

    async def _release(self, item: Text | AIMessageChunk) -> AIMessageChunk:
        if isinstance(item, AIMessageChunk):
            # A provider may send text between two pieces of one call: each is judged together with those before it.
            self._held = item if self._held is None else self._held + item
            for part, text in held_material(self._held):
                await self._check(part, text)
            return item
        await self._check("block", item.remarks)
        if item.spoken:
            self.spoken += item.text
        else:
            self._reasoned += item.text
        return item.chunk()

    async def _check(self, part: str, text: str) -> None:
        if text.strip() and not await self.ledger.passes([text], self.prompt):
            raise WithheldError(part)
