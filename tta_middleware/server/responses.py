"""``POST /v1/responses`` over guarded models: text and function tools, nothing stored."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from langchain_core.messages import AIMessage
from starlette.responses import Response

from tta_middleware.moderation.server import json_object
from tta_middleware.server.answers import Answers
from tta_middleware.server.chat_request import read_request
from tta_middleware.server.front import NAMED_EVENTS, Call, EventStream, json_response
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
        answer = await self.answers.begin(call, asked.chat())
        reply = ResponseReply(answer, asked)
        if asked.stream:
            return EventStream(call, _events(reply, await answer.begun()), answer.policy.header, NAMED_EVENTS)
        reply.take(await answer.whole())
        return json_response(reply.finished(await answer.moderation()), headers=answer.headers)


async def _events(
    reply: ResponseReply, pieces: AsyncGenerator[AIMessage, None]
) -> AsyncGenerator[dict[str, Any], None]:
    async with aclosing(pieces):
        for event in reply.begin():
            yield event
        async for piece in pieces:
            for event in reply.pieces(piece):
                yield event
    for event in reply.end():
        yield event
    yield reply.last(await reply.answer.moderation())
