"""``POST /v1/chat/completions`` over guarded models."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from langchain_core.messages import AIMessage
from starlette.responses import Response

from tta_middleware.moderation.server import json_object
from tta_middleware.server.answers import Answer, Answers
from tta_middleware.server.chat_request import ChatRequest, read_request
from tta_middleware.server.front import Call, EventStream, json_response


@dataclass(eq=False, slots=True)
class ChatCompletions:
    """The endpoint."""

    answers: Answers

    async def create(self, call: Call) -> Response | EventStream:
        """An answer, whole or as a stream.

        Raises:
            ApiError: the request cannot be read, names no model, or there is no place for it.
            TTAError: what the model raises before any text has left.
        """
        asked = read_request(ChatRequest, json_object(call.body))
        answer = await self.answers.begin(call, asked)
        if asked.stream:
            return EventStream(call, _events(answer, await answer.begun()), answer.policy.header)
        told = answer.reply.completion(await answer.whole())
        if moderation := await answer.moderation():
            told["moderation"] = moderation
        return json_response(told, headers=answer.headers)


async def _events(answer: Answer, pieces: AsyncGenerator[AIMessage, None]) -> AsyncGenerator[dict[str, Any], None]:
    reply = answer.reply
    async with aclosing(pieces):
        yield reply.chunk({"role": "assistant", "content": "", "refusal": None})
        async for piece in pieces:
            for delta in reply.deltas(piece):
                yield reply.chunk(delta)
    yield reply.last_chunk()
    if moderation := await answer.moderation():
        yield reply.extra_chunk(moderation=moderation)
    if answer.asked.include_usage:
        yield reply.extra_chunk(usage=reply.usage)
