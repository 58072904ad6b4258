"""One message of another model on its way through the guard."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import UsageMetadata

from tta_langchain_agents.content import last_human_text, material, own_id, text_only, without_probabilities
from tta_langchain_agents.handover import Handover, StandIn
from tta_langchain_agents.stream import WatchedStream, WithheldError
from tta_middleware.aio.streams import Send, owned
from tta_middleware.call_text import begins_as_json
from tta_middleware.chat_model.messages import from_langchain
from tta_middleware.chat_model.refusal import REFUSAL
from tta_middleware.config import Windows
from tta_middleware.guard.ledger import Ledger
from tta_middleware.observing import NOBODY, AnswerObserver, Asked, observer
from tta_middleware.types import SEAM, GuardedAnswer, Trace

Ending: TypeAlias = Literal["stop", "length", "content_filter"]

_ENDINGS: Final[Mapping[str, Ending]] = {"length": "length", "max_tokens": "length", "content_filter": "content_filter"}
"""Reasons of providers that telemetry tells apart from a natural end."""


@dataclass(slots=True)
class GuardedCall:
    """One message of the inner model on its way through the guard.

    Attributes:
        provider: of the inner model, as LangChain calls it.
        stop: what an answer ends before, whoever gives it.
    """

    ledger: Ledger
    handover: Handover
    messages: Sequence[BaseMessage]
    model: str
    windows: Windows | None
    provider: str
    stop: list[str] | str | None = None
    prompt: str | None = field(init=False)
    _observer: AnswerObserver = NOBODY

    def __post_init__(self) -> None:
        self.prompt = last_human_text(self.messages)

    @contextmanager
    def observed(self, *, stream: bool) -> Iterator[None]:
        """Telemetry hears of what is done inside, in one task, as of one answer."""
        listener = observer()
        asked = Asked(
            model=self.model,
            moderator=self.ledger.name,
            method=self.handover.action,
            sampling=None,
            stream=stream,
            messages=() if listener is NOBODY else from_langchain(text_only(self.messages)),
            provider=self.provider,
        )
        with listener.answering(asked) as self._observer:
            self.ledger.observer = self._observer
            yield

    async def checked(self, message: AIMessage) -> AIMessage:
        """The message if it may be shown, else what stands in for it."""
        for part, texts in material(message):
            if not await self.ledger.passes(texts, self.prompt):
                stand_in = self._stand_in(part, message)
                instead = await stand_in.message()
                self._approve(instead.text)
                self._tell(instead, stand_in.trace, stand_in.flagged_usage)
                return instead.model_copy(update={"id": own_id(message.id), "name": message.name})
        trace = self._trace(message)
        self._tell(message, trace, message.usage_metadata)
        metadata = without_probabilities(message.response_metadata) | {"tta": trace.as_dict()}
        return message.model_copy(update={"id": own_id(message.id), "response_metadata": metadata})

    async def stream(self, chunks: AsyncGenerator[AIMessage, None]) -> AsyncGenerator[AIMessageChunk, None]:
        """The message's chunks, checked, and its metadata on the last one."""

        async def produce(send: Send[AIMessageChunk]) -> None:
            with self.observed(stream=self.windows is not None):
                async with aclosing(self._chunks(chunks)) as checked:
                    async for chunk in checked:
                        if chunk.text:
                            self._observer.released()
                        await send(chunk)

        async with aclosing(owned(produce)) as pieces:
            async for piece in pieces:
                yield piece

    async def _chunks(self, chunks: AsyncGenerator[AIMessage, None]) -> AsyncGenerator[AIMessageChunk, None]:
        watched = WatchedStream(self.ledger, self.windows, self.prompt)
        try:
            async with aclosing(watched.run(self._unbroken(chunks))) as checked:
                async for chunk in checked:
                    yield self._named(chunk, watched)
        except WithheldError as withheld:
            stand_in = self._stand_in(withheld.part, watched.track.tail, said=watched.spoken)
        else:
            tail = watched.track.tail
            trace = self._trace(tail)
            metadata = tail.response_metadata | {"tta": trace.as_dict()}
            self._tell(tail.model_copy(update={"content": watched.spoken}), trace, tail.usage_metadata)
            yield self._named(
                tail.model_copy(update={"response_metadata": metadata, "chunk_position": "last"}), watched
            )
            return
        async with aclosing(self._instead(stand_in, watched)) as chunks_instead:
            async for chunk in chunks_instead:
                yield self._named(chunk, watched)

    async def _unbroken(self, chunks: AsyncGenerator[AIMessage, None]) -> AsyncGenerator[AIMessage, None]:
        """The inner model's chunks, and its error: that may quote what it said, so it is checked, too."""
        async with self.ledger.judged_errors("the model"), aclosing(chunks):
            async for chunk in chunks:
                yield chunk

    async def _instead(self, stand_in: StandIn, watched: WatchedStream) -> AsyncGenerator[AIMessageChunk, None]:
        """The stand-in's chunks, after what has left already."""
        said, refusal = watched.spoken, ""
        separator, parsed = SEAM if said.strip() else "", begins_as_json(said)
        async with aclosing(stand_in.stream()) as pieces:
            async for piece in pieces:
                if parsed:  # a parser of JSON that comes in pieces would take another text for the end of a string
                    refusal += piece
                    continue
                said, text, separator = said + separator + piece, separator + piece, ""
                yield AIMessageChunk(content=text)
        self._approve(said)
        last = AIMessageChunk(
            content="",
            response_metadata=stand_in.metadata | ({REFUSAL: refusal} if refusal else {}),
            usage_metadata=stand_in.usage,
            chunk_position="last",
        )
        self._tell(last.model_copy(update={"content": said}), stand_in.trace, stand_in.flagged_usage)
        yield last

    def _stand_in(self, part: str, message: AIMessage, said: str = "") -> StandIn:
        usage = message.usage_metadata
        return StandIn(self.handover, self.ledger, self.messages, part, self.model, usage, said, self.stop)

    def _trace(self, message: AIMessage) -> Trace:
        tokens = message.usage_metadata["output_tokens"] if message.usage_metadata else 0
        outcome = self.ledger.outcome
        reason = "clean" if outcome == "clean" else f"{self.ledger.reason('')}, passed by policy"
        return self.ledger.trace(outcome, reason, method=self.handover.action, model=self.model, tokens=tokens)

    def _tell(self, message: AIMessage, trace: Trace, usage: UsageMetadata | None) -> None:
        """Telemetry hears of the answer; of another model's in its place it hears from that."""
        reason, prompt = message.response_metadata.get("finish_reason"), usage["input_tokens"] if usage else 0
        known: Ending = _ENDINGS.get(str(reason), "stop")
        self._observer.answered(GuardedAnswer(str(message.text), known, trace, prompt))

    def _approve(self, text: str) -> None:
        self.ledger.approved.add(text)

    def _named(self, chunk: AIMessageChunk, watched: WatchedStream) -> AIMessageChunk:
        chunk.id = watched.track.id
        return chunk
