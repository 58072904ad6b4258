"""``POST /v1/chat/completions`` over guarded models."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from langchain_core.messages import AIMessage
from starlette.responses import Response

from tta_middleware.http_api import json_object
from tta_middleware.server.answers import Answer, Answers, Choices, Pieces, WithoutNotice
from tta_middleware.server.chat_request import ChatRequest, read_request
from tta_middleware.server.front import PLAIN_EVENTS, Call, EventForm, EventStream


@dataclass(eq=False, slots=True)
class ChatCompletions:
    """The endpoint."""

    answers: Answers

    async def create(self, call: Call) -> Response | EventStream:
        """The choices that were asked for, whole or as a stream.

        Raises:
            ApiError: the request cannot be read, names no model, or there is no place for it.
            TTAError: what the model raises before any text has left.
        """
        choices = await self.answers.begin(call, read_request(ChatRequest, json_object(call.body)))
        return await choices.response(_Completion(choices))


@dataclass(frozen=True, slots=True)
class _Completion:
    """Answers as a chat completion, or as its chunks."""

    choices: Choices
    form: EventForm = PLAIN_EVENTS

    async def body(self, messages: list[AIMessage]) -> dict[str, Any]:
        replies = [answer.reply for answer in self.choices.answers]
        told = replies[0].about("chat.completion")
        told["choices"] = [reply.choice(message) for reply, message in zip(replies, messages, strict=True)]
        told |= {"usage": self.choices.usage, **replies[0].outer_trace}
        if moderation := await self.choices.moderation():
            told["moderation"] = moderation
        return told

    async def events(self, pieces: Pieces) -> AsyncGenerator[dict[str, Any], None]:
        first = self.choices.answers[0].reply
        texts = {answer.reply.index: WithoutNotice(answer) for answer in self.choices.answers if answer.reply.parsed}
        async with aclosing(pieces):
            for answer in self.choices.answers:
                yield answer.reply.chunk({"role": "assistant", "content": "", "refusal": None})
            async for answer, piece in pieces:
                for delta in _deltas(answer, piece, texts.get(answer.reply.index)):
                    yield answer.reply.chunk(delta)
                if piece is None:
                    yield answer.reply.last_chunk()
        if moderation := await self.choices.moderation():
            yield first.extra_chunk(moderation=moderation)
        if self.choices.asked.include_usage:
            yield first.extra_chunk(usage=self.choices.usage)


def _deltas(answer: Answer, piece: AIMessage | None, text: WithoutNotice | None) -> Iterator[dict[str, Any]]:
    """What a piece adds; None is the end. ``text`` keeps the notice out, where that must not be."""
    if piece is None:
        yield from ({"content": said} for said in (text.rest() if text else ()))
        return
    for delta in answer.reply.deltas(piece):
        if text is None or "content" not in delta:
            yield delta
        else:
            yield from ({"content": said} for said in text.take(delta["content"]) if said)
