"""``POST /v1/responses`` over guarded models: text and function tools, nothing stored."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from langchain_core.messages import AIMessage
from starlette.responses import Response

from tta_middleware.http_api import json_object
from tta_middleware.server.answers import Answers, Choices, Pieces
from tta_middleware.server.chat_request import read_request
from tta_middleware.server.front import NAMED_EVENTS, Call, EventForm, EventStream
from tta_middleware.server.responses_reply import ResponseReply
from tta_middleware.server.responses_request import ResponseRequest


@dataclass(eq=False, slots=True)
class Responses:
    """The endpoint."""

    answers: Answers

    async def create(self, call: Call) -> Response | EventStream:
        """A response, whole or as a stream of events.

        Raises:
            ApiError: the request cannot be read, names no model, or there is no place for it.
            TTAError: what the model raises before any text has left.
        """
        asked = read_request(ResponseRequest, json_object(call.body))
        choices = await self.answers.begin(call, asked.chat())
        [answer] = choices.answers
        return await choices.response(_Response(choices, ResponseReply(answer, asked)))


@dataclass(frozen=True, slots=True)
class _Response:
    """The one answer as a response, or as its events."""

    choices: Choices
    reply: ResponseReply
    form: EventForm = NAMED_EVENTS

    async def body(self, messages: list[AIMessage]) -> dict[str, Any]:
        [message] = messages
        self.reply.take(message)
        return self.reply.finished(await self.choices.moderation())

    async def events(self, pieces: Pieces) -> AsyncGenerator[dict[str, Any], None]:
        async with aclosing(pieces):
            for event in self.reply.begin():
                yield event
            async for _, piece in pieces:
                for event in self.reply.pieces(piece) if piece is not None else ():
                    yield event
        for event in self.reply.end():
            yield event
        yield self.reply.last(await self.choices.moderation())
