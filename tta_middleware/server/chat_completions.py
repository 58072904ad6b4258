"""``POST /v1/chat/completions`` over guarded chat models."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, cast

from langchain_core.messages import AIMessage, AIMessageChunk
from starlette.responses import Response

from tta_middleware.chat_model import TTAChatModel
from tta_middleware.chat_model.refusal import RefusedAnswerError
from tta_middleware.moderation.server import json_object
from tta_middleware.policy import StagePolicies
from tta_middleware.server.answering import Answering, LocalAnswer, ServedModel
from tta_middleware.server.chat_reply import Reply
from tta_middleware.server.chat_request import ChatRequest, read_request
from tta_middleware.server.front import Call, EventStream, json_response
from tta_middleware.server.gate import Gate, Shares
from tta_middleware.server.inline_moderation import inline_moderation
from tta_middleware.server.models import OUTCOME_HEADER, Chosen, ServedModels
from tta_middleware.server.upstream import UpstreamModel

_SEAM = "\n\n"


@dataclass(eq=False, slots=True)
class ChatCompletions:
    """The endpoint.

    Attributes:
        gate: places for answers under way.
        shares: how many of them each key holds.
        show_trace: whether answers carry their trace.
    """

    models: ServedModels
    gate: Gate
    shares: Shares
    show_trace: bool = True

    async def create(self, call: Call) -> Response | EventStream:
        """An answer, whole or as a stream.

        Raises:
            ApiError: the request cannot be read, names no model, or there is no place for it.
            TTAError: what the chat model raises before any text has left.
        """
        asked = read_request(ChatRequest, json_object(call.body))
        model = self.models.named(call, asked.model)
        call.record.model, call.record.stream = asked.model, bool(asked.stream)
        policy = self.models.policy(call, model).stricter(asked.tta)
        call.record.policy = policy.name
        answering_ = answering(model, asked, policy.stages, call.most_tokens)
        call.held.enter_context(self.shares.one(call.caller))
        await call.held.enter_async_context(self.gate.place())
        answer = _Answer(call, asked, model, policy, answering_, Reply(asked.model, self.show_trace))
        return await (answer.stream() if asked.stream else answer.whole())


def answering(model: ServedModel, asked: ChatRequest, stages: StagePolicies, most_tokens: int | None) -> Answering:
    """The answer of a served model to a request, not yet begun.

    Raises:
        ApiError: the request asks for more than it may.
    """
    if isinstance(model, UpstreamModel):
        return model.answering(asked, stages, most_tokens)
    return LocalAnswer.of(cast("TTAChatModel", model), asked, stages, most_tokens)


@dataclass(eq=False, slots=True)
class _Answer:
    """One answer under way."""

    call: Call
    asked: ChatRequest
    model: ServedModel
    policy: Chosen
    answering: Answering
    reply: Reply

    async def whole(self) -> Response:
        try:
            message = await self.answering.whole()
        except RefusedAnswerError as error:
            message = _refusal(error)
        self.reply.note(message)
        self._log()
        told = self.reply.completion(message)
        if moderation := await self._moderation():
            told["moderation"] = moderation
        outcome = self.reply.trace.get("outcome")
        return json_response(told, headers=self.policy.header | ({OUTCOME_HEADER: outcome} if outcome else {}))

    async def stream(self) -> EventStream:
        """The stream, once its first piece is there: an error before that has a status of its own."""
        chunks = self.answering.stream()
        # The generator of events below closes it, too, but only once it has begun.
        self.call.held.push_async_callback(chunks.aclose)
        first: AIMessageChunk | RefusedAnswerError | None
        try:
            first = await anext(chunks, None)
        except RefusedAnswerError as error:
            first = error
        return EventStream(self.call, self._events(first, chunks), self.policy.header)

    async def _events(
        self, first: AIMessageChunk | RefusedAnswerError | None, rest: AsyncGenerator[AIMessageChunk, None]
    ) -> AsyncGenerator[dict[str, Any], None]:
        reply = self.reply
        async with aclosing(rest):
            yield reply.chunk({"role": "assistant", "content": "", "refusal": None})
            try:
                async for chunk in _from(first, rest):
                    reply.note(chunk)
                    for delta in reply.deltas(chunk):
                        yield reply.chunk(delta)
            except RefusedAnswerError as error:
                message = _refusal(error)
                lead = _SEAM if reply.said else ""
                reply.note(message)
                yield reply.chunk({"content": lead + str(message.text)})
        self._log()
        yield reply.last_chunk()
        if moderation := await self._moderation():
            yield reply.extra_chunk(moderation=moderation)
        if self.asked.include_usage:
            yield reply.extra_chunk(usage=reply.usage)

    async def _moderation(self) -> dict[str, Any] | None:
        if self.asked.moderation is None:
            return None
        asked, said = self.asked.last_user_text, self.reply.moderated_text()
        return await inline_moderation(self.model.scorer, self.policy.stages, asked, said, self.reply.trace)

    def _log(self) -> None:
        record, usage = self.call.record, self.reply.usage or {}
        record.outcome, record.finish_reason = self.reply.trace.get("outcome"), self.reply.finish_reason
        record.prompt_tokens, record.completion_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")


async def _from(
    first: AIMessageChunk | RefusedAnswerError | None, rest: AsyncGenerator[AIMessageChunk, None]
) -> AsyncIterator[AIMessageChunk]:
    """The stream as it would have been, had nobody looked at its beginning."""
    if isinstance(first, RefusedAnswerError):
        raise first
    if first is not None:
        yield first
        async for chunk in rest:
            yield chunk


def _refusal(error: RefusedAnswerError) -> AIMessage:
    """The message that says no, where the model is set to raise: to a client a block is an answer."""
    if not isinstance(error.raw_message, AIMessage):
        raise error
    return error.raw_message
