"""A foreign model's message chunks, cut into windows that are checked while it goes on."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from langchain_core.messages import AIMessage, AIMessageChunk

from tta_langchain_agents.content import Text, held_material, own_id, tail_material, take_apart
from tta_middleware.aio.streams import Send, owned
from tta_middleware.config import Windows
from tta_middleware.errors import FlaggedError, ModerationError
from tta_middleware.guard.ledger import Ledger
from tta_middleware.guard.moderated import Thoughts, moderated
from tta_middleware.types import Channel, TextDelta


class WithheldError(Exception):
    """The rest of a message may not be shown; ``part`` is the part of it that was flagged."""

    def __init__(self, part: str) -> None:
        super().__init__(part)
        self.part = part


@dataclass(slots=True)
class Track:
    """The chunks that came in, in order, so that checked text leaves in the shape in which it came.

    Text is a queue of pieces of the answer and of thoughts. Tool calls and other blocks lie between the pieces; those
    that follow one another are one item.
    """

    id: str | None = None
    tail: AIMessageChunk = field(default_factory=lambda: AIMessageChunk(content=""))
    _items: deque[Text | AIMessageChunk] = field(default_factory=deque)
    _checked: Counter[Channel] = field(default_factory=Counter)

    def add(self, chunk: AIMessage) -> Iterator[TextDelta]:
        """Takes a chunk in; gives its text."""
        taken = take_apart(chunk)
        self.id = self.id or own_id(chunk.id)
        self.tail = self.tail + taken.tail
        self._items += taken.texts
        if taken.held is not None:
            last = self._items.pop() if self._items and isinstance(self._items[-1], AIMessageChunk) else None
            self._items.append(taken.held if last is None else last + taken.held)  # type: ignore[operator]
        yield from (TextDelta(text.text, channel=_channel(text)) for text in taken.texts if text.text)

    def take(self, passed: Passed) -> Iterator[Text | AIMessageChunk]:
        """What may leave once so many characters more of a channel have passed, and what lies between them.

        Word of a thought may overtake that of the text before it; it waits here until that has come.
        """
        self._checked[passed.channel] += passed.count
        while self._items and self._checked.total():
            item = self._items.popleft()
            if isinstance(item, Text):
                count = self._checked[_channel(item)]
                if item.text and not count:
                    self._items.appendleft(item)
                    return
                if len(item.text) > count:
                    item, later = item.split(count)
                    self._items.appendleft(later)
                self._checked[_channel(item)] -= len(item.text)
            yield item

    def rest(self) -> Iterator[Text | AIMessageChunk]:
        """What is left when all text was taken."""
        while self._items:
            yield self._items.popleft()


@dataclass(frozen=True, slots=True)
class Passed:
    """So many characters more of a channel have passed their check."""

    channel: Channel
    count: int


def _channel(text: Text) -> Channel:
    return "answer" if text.spoken else "reasoning"


@dataclass(slots=True)
class Merged:
    """The text of one channel as LangChain puts a message's chunks together: a piece goes to the block of its index.

    Attributes:
        by_turns: whether a piece went to a block behind which others had begun.
    """

    by_turns: bool = False
    _blocks: dict[Any, str] = field(default_factory=dict)

    def add(self, item: Text) -> None:
        at, last = item.place, next(reversed(self._blocks), None)
        if at is None:  # it goes to the end
            at = last if isinstance(last, _End) else _End()
        self.by_turns |= at in self._blocks and at != last
        self._blocks[at] = self._blocks.get(at, "") + item.text

    @property
    def text(self) -> str:
        return "".join(self._blocks.values())


class _End:
    """The place of pieces that no index names."""


@dataclass(slots=True)
class WatchedStream:
    """One message on its way from the model to the consumer.

    A reader takes the answer without the thoughts between its pieces, and thoughts without the answer's: each is judged
    by itself.

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
    _merged: dict[Channel, Merged] = field(default_factory=lambda: defaultdict(Merged))

    async def run(self, chunks: AsyncGenerator[AIMessage, None]) -> AsyncGenerator[AIMessageChunk, None]:
        """The chunks that may be shown, the message's metadata excepted; see ``track.tail``.

        Raises:
            WithheldError: something was flagged or could not be scored; nothing of it was yielded.
        """

        async def produce(send: Send[Passed]) -> None:
            await self._checked(chunks, send)

        try:
            async with aclosing(owned(produce)) as passing:
                async for passed in passing:
                    for item in self.track.take(passed):
                        yield await self._release(item)
        except FlaggedError as error:
            raise WithheldError("reasoning" if error.thought else "text") from None
        except ModerationError:
            raise WithheldError("text") from None
        for item in self.track.rest():
            yield await self._release(item)
        for part, text in tail_material(self.track.tail):
            await self._check(part, text)
        self.ledger.approved |= {self.spoken, self._reasoned}

    async def _checked(self, chunks: AsyncGenerator[AIMessage, None], send: Send[Passed]) -> None:
        """Tells ``send`` what has passed; without windows only once all has."""
        held = list[Passed]()

        async def leave(channel: Channel, text: str) -> None:
            passed = Passed(channel, len(text))
            if self.windows is None:
                held.append(passed)
            else:
                await send(passed)

        policy, windows = self.ledger.policy, self.windows
        thoughts = Thoughts(self.ledger, policy, partial(leave, "reasoning"))
        texts, hold = self._texts(chunks), windows is None
        checked = moderated(
            texts, self.ledger, policy, windows=windows, hold=hold, prompt=self.prompt, thoughts=thoughts
        )
        async with aclosing(checked) as pieces:
            async for piece in pieces:
                await leave("answer", piece)
        for passed in held:
            await send(passed)

    async def _texts(self, chunks: AsyncGenerator[AIMessage, None]) -> AsyncGenerator[TextDelta, None]:
        async with aclosing(chunks):
            async for chunk in chunks:
                for text in self.track.add(chunk):
                    yield text

    async def _release(self, item: Text | AIMessageChunk) -> AIMessageChunk:
        held = item if isinstance(item, AIMessageChunk) else item.beside
        if held is not None:
            # A provider may send text between two pieces of one call: each is judged together with those before it.
            self._held = held if self._held is None else self._held + held
            for part, text in held_material(self._held):
                await self._check(part, text)
        if isinstance(item, AIMessageChunk):
            return item
        await self._check_by_turns(item)
        if item.spoken:
            self.spoken += item.text
        else:
            self._reasoned += item.text
        return item.chunk()

    async def _check_by_turns(self, item: Text) -> None:
        """Where pieces do not stand in the order in which they come, the text is judged as it stands as well."""
        merged = self._merged[_channel(item)]
        merged.add(item)
        if merged.by_turns:
            await self._check("text" if item.spoken else "reasoning", merged.text)

    async def _check(self, part: str, text: str) -> None:
        if text.strip() and not await self.ledger.passes([text], self.prompt):
            raise WithheldError(part)
