"""What every endpoint that answers has in common: the way in, one answer under way, and what is told of it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, cast

from langchain_core.messages import AIMessage, AIMessageChunk

from tta_middleware.chat_model import TTAChatModel
from tta_middleware.chat_model.refusal import RefusedAnswerError
from tta_middleware.policy import StagePolicies
from tta_middleware.server.answering import Answering, Foreign, LocalAnswer, ServedModel
from tta_middleware.server.chat_reply import Reply
from tta_middleware.server.chat_request import ChatRequest
from tta_middleware.server.front import Call
from tta_middleware.server.gate import Gate, Shares
from tta_middleware.server.inline_moderation import inline_moderation
from tta_middleware.server.models import OUTCOME_HEADER, Chosen, ServedModels

SEAM = "\n\n"
"""Between what has left and the notice."""


@dataclass(eq=False, slots=True)
class Answers:
    """Takes requests in, whatever endpoint they came by.

    Attributes:
        gate: places for answers under way.
        shares: how many of them each key holds.
        show_trace: whether answers carry their trace.
    """

    models: ServedModels
    gate: Gate
    shares: Shares
    show_trace: bool = True

    async def begin(self, call: Call, asked: ChatRequest) -> Answer:
        """An answer that holds a place until the response has left.

        Raises:
            ApiError: the request names no model, asks for what it may not, or there is no place for it.
        """
        model = self.models.named(call, asked.model)
        call.record.model, call.record.stream = asked.model, bool(asked.stream)
        policy = self.models.policy(call, model).stricter(asked.tta)
        call.record.policy = policy.name
        answering_ = answering(model, asked, policy.stages, call.most_tokens)
        call.held.enter_context(self.shares.one(call.caller))
        await call.held.enter_async_context(self.gate.place())
        return Answer(call, asked, model, policy, answering_, Reply(asked.model, self.show_trace))


def answering(model: ServedModel, asked: ChatRequest, stages: StagePolicies, most_tokens: int | None) -> Answering:
    """The answer of a served model to a request, not yet begun.

    Raises:
        ApiError: the request asks for more than it may.
    """
    if isinstance(model, TTAChatModel):
        return LocalAnswer.of(model, asked, stages, most_tokens)
    return cast("Foreign", model).answering(asked, stages, most_tokens)


@dataclass(eq=False, slots=True)
class Answer:
    """One answer under way.

    Attributes:
        reply: notes what comes, and knows its shape in chat completions.
    """

    call: Call
    asked: ChatRequest
    model: ServedModel
    policy: Chosen
    answering: Answering
    reply: Reply

    async def whole(self) -> AIMessage:
        """All of it, noted and logged; a refusal is an answer.

        Raises:
            TTAError: what the model raises.
        """
        try:
            message = await self.answering.whole()
        except RefusedAnswerError as error:
            message = _refusal(error)
        self.reply.note(message)
        self.log()
        return message

    async def begun(self) -> AsyncGenerator[AIMessage, None]:
        """The stream, once its first piece is there: an error before that has a status of its own.

        Raises:
            TTAError: what the model raises before its first piece.
        """
        chunks = self.answering.stream()
        # The generator below closes it, too, but only once it has begun.
        self.call.held.push_async_callback(chunks.aclose)
        first: AIMessageChunk | RefusedAnswerError | None
        try:
            first = await anext(chunks, None)
        except RefusedAnswerError as error:
            first = error
        return self._pieces(first, chunks)

    async def _pieces(
        self, first: AIMessageChunk | RefusedAnswerError | None, rest: AsyncGenerator[AIMessageChunk, None]
    ) -> AsyncGenerator[AIMessage, None]:
        async with aclosing(rest):
            try:
                if isinstance(first, RefusedAnswerError):
                    raise first
                if first is not None:
                    yield self._noted(first)
                    async for chunk in rest:
                        yield self._noted(chunk)
            except RefusedAnswerError as error:
                message = _refusal(error)
                lead = SEAM if self.reply.said else ""
                yield self._noted(message.model_copy(update={"content": lead + str(message.text)}))
        self.log()

    def _noted(self, message: AIMessage) -> AIMessage:
        self.reply.note(message)
        return message

    async def moderation(self) -> dict[str, Any] | None:
        """Scores of prompt and answer, where the client asked for them."""
        if self.asked.moderation is None:
            return None
        asked, said = self.asked.last_user_text, self.reply.moderated_text()
        return await inline_moderation(self.model.scorer, self.policy.stages, asked, said, self.reply.trace)

    @property
    def headers(self) -> dict[str, str]:
        """The policy and, once that is known, the outcome."""
        outcome = self.reply.trace.get("outcome")
        return self.policy.header | ({OUTCOME_HEADER: outcome} if outcome else {})

    def log(self) -> None:
        record, usage = self.call.record, self.reply.usage or {}
        record.outcome, record.finish_reason = self.reply.trace.get("outcome"), self.reply.finish_reason
        record.prompt_tokens, record.completion_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")


def _refusal(error: RefusedAnswerError) -> AIMessage:
    """The message that says no, where the model is set to raise: to a client a block is an answer."""
    if not isinstance(error.raw_message, AIMessage):
        raise error
    return error.raw_message
