"""What every endpoint that answers has in common: the way in, the answers under way, and what is told of them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias, cast

import anyio
from langchain_core.messages import AIMessage
from starlette.responses import Response

from tta_middleware.aio.streams import Send, first_error, owned
from tta_middleware.chat_model import TTAChatModel
from tta_middleware.chat_model.refusal import RefusedAnswerError
from tta_middleware.http_api import ApiError
from tta_middleware.policy import StagePolicies
from tta_middleware.server.answering import Answering, Foreign, LocalAnswer, ServedModel
from tta_middleware.server.chat_reply import Reply, usage_of
from tta_middleware.server.chat_request import ChatRequest
from tta_middleware.server.front import Call, EventForm, EventStream, json_response
from tta_middleware.server.gate import Gate, Shares
from tta_middleware.server.inline_moderation import inline_moderation
from tta_middleware.server.models import OUTCOME_HEADER, Chosen, ServedModels
from tta_middleware.types import SEAM

_WORST = ("blocked", "unanswered", "unchecked", "neutralised", "clean")
"""Outcomes; of several answers the first of these is told in the header and in the log."""


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

    async def begin(self, call: Call, asked: ChatRequest) -> Choices:
        """Answers that hold a place each until the response has left.

        Raises:
            ApiError: the request names no model, asks for what it may not, or there is no place for it.
        """
        model = self.models.named(call, asked.model)
        call.record.model, call.record.stream = asked.model, bool(asked.stream)
        policy = self.models.policy(call, model).stricter(asked.tta)
        call.record.policy = policy.name
        answers = list(self._answers(call, asked, model, policy))
        call.held.enter_context(self.shares.hold(call.caller, len(answers)))
        await call.held.enter_async_context(self.gate.places(len(answers)))
        await self.models.loaded(model)
        return Choices(call, asked, model, policy, answers)

    def _answers(self, call: Call, asked: ChatRequest, model: ServedModel, policy: Chosen) -> Iterator[Answer]:
        count = asked.n or 1
        if count > call.most_choices:
            raise ApiError(400, f"at most {call.most_choices} choices may be asked for, not {count}", param="n")
        first = Reply(asked.model, self.show_trace, several=count > 1, parsed=asked.asks_for_json)
        for index, one in enumerate(asked.choices(model.seed if isinstance(model, TTAChatModel) else None)):
            yield Answer(answering(model, one, policy.stages, call.most_tokens), policy, first.sibling(index))


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

    answering: Answering
    policy: Chosen
    reply: Reply

    async def whole(self) -> AIMessage:
        """All of it, noted; a refusal is an answer.

        Raises:
            TTAError: what the model raises.
        """
        try:
            message = await self.answering.whole()
        except RefusedAnswerError as error:
            message = _refusal(error)
        return self._noted(message)

    async def pieces(self) -> AsyncGenerator[AIMessage, None]:
        """The stream; a refusal is its last piece.

        Raises:
            TTAError: what the model raises.
        """
        refused: RefusedAnswerError | None = None
        async with aclosing(self.answering.stream()) as chunks:
            try:
                async for chunk in chunks:
                    yield self._noted(chunk)
            except RefusedAnswerError as error:
                refused = error
        if refused is not None:
            message = _refusal(refused)
            lead = SEAM if self.reply.said else ""
            yield self._noted(message.model_copy(update={"content": lead + str(message.text)}))

    def _noted(self, message: AIMessage) -> AIMessage:
        self.reply.note(message)
        return message


@dataclass(slots=True)
class WithoutNotice:
    """The text of an answer but for the notice of a block, which ``refusal`` tells.

    Whoever parses the text as JSON must not meet it there.
    """

    answer: Answer
    _held: str = ""

    def take(self, text: str) -> Iterator[str]:
        """What may be given out of what has come."""
        yield from self._let_go()
        if self._is_notice(text):
            self._held = text  # whether it is one shows at the end
        else:
            yield self.answer.reply.unrefused(text)

    def rest(self) -> Iterator[str]:
        """What is left once the model has ended."""
        if self.answer.reply.refusal is None:
            yield from self._let_go()

    def _let_go(self) -> Iterator[str]:
        text, self._held = self._held, ""
        if text:
            yield text

    def _is_notice(self, text: str) -> bool:
        said = text.removeprefix(SEAM)
        return said == self.answer.reply.refusal or said in self.answer.policy.stages.output.every_notice()


Pieces: TypeAlias = AsyncGenerator[tuple[Answer, AIMessage | None], None]
"""What comes of which answer; None where that answer has ended."""


class Shape(Protocol):
    """How an endpoint gives answers out."""

    @property
    def form(self) -> EventForm: ...

    def events(self, pieces: Pieces) -> AsyncGenerator[dict[str, Any], None]:
        """The events of a stream; closes ``pieces``."""
        ...

    async def body(self, messages: list[AIMessage]) -> dict[str, Any]:
        """The answers at once."""
        ...


@dataclass(eq=False, slots=True)
class Choices:
    """The answers to one request, each behind a guard of its own, decoded side by side."""

    call: Call
    asked: ChatRequest
    model: ServedModel
    policy: Chosen
    answers: list[Answer]

    async def response(self, shape: Shape) -> Response | EventStream:
        """Whole, or a stream where that was asked for; an error before its first piece has a status of its own.

        Raises:
            TTAError: what a model raises before any text has left.
        """
        if self.asked.stream:
            return EventStream(self.call, shape.events(await self._begun()), self.policy.header, shape.form)
        messages = await self._whole()
        self._log()
        return json_response(await shape.body(messages), headers=self.headers)

    async def _whole(self) -> list[AIMessage]:
        if len(self.answers) == 1:
            return [await self.answers[0].whole()]
        found: dict[int, AIMessage] = {}

        async def one(index: int, answer: Answer) -> None:
            found[index] = await answer.whole()

        try:
            async with anyio.create_task_group() as group:
                for index, answer in enumerate(self.answers):
                    group.start_soon(one, index, answer)
        except BaseExceptionGroup as errors:
            raise first_error(errors) from None
        return [message for _, message in sorted(found.items())]

    async def _begun(self) -> Pieces:
        """The stream, once its first piece is there."""
        pieces = self._single() if len(self.answers) == 1 else owned(self._side_by_side)
        # The generator below closes it, too, but only once it has begun.
        self.call.held.push_async_callback(pieces.aclose)
        return self._from(await anext(pieces, None), pieces)

    async def _from(self, first: tuple[Answer, AIMessage | None] | None, rest: Pieces) -> Pieces:
        async with aclosing(rest):
            if first is not None:
                yield first
                async for piece in rest:
                    yield piece
        self._log()

    async def _single(self) -> Pieces:
        [answer] = self.answers
        async with aclosing(answer.pieces()) as pieces:
            async for piece in pieces:
                yield answer, piece
        yield answer, None

    async def _side_by_side(self, send: Send[tuple[Answer, AIMessage | None]]) -> None:
        """All streams as they come; while the client does not read, all of them wait."""

        async def one(answer: Answer) -> None:
            async with aclosing(answer.pieces()) as pieces:
                async for piece in pieces:
                    await send((answer, piece))
            await send((answer, None))

        try:
            async with anyio.create_task_group() as group:
                for answer in self.answers:
                    group.start_soon(partial(one, answer))
        except BaseExceptionGroup as errors:
            raise first_error(errors) from None

    async def moderation(self) -> dict[str, Any] | None:
        """Scores of prompt and answers, where the client asked for them."""
        if self.asked.moderation is None:
            return None
        said = [(answer.reply.moderated_text(), answer.reply.trace) for answer in self.answers]
        return await inline_moderation(self.model.scorer, self.policy.stages, self.asked.last_user_text, said)

    @property
    def usage(self) -> dict[str, Any] | None:
        """Of all answers; the prompt counts once."""
        return usage_of([answer.reply for answer in self.answers])

    @property
    def headers(self) -> dict[str, str]:
        """The policy and, once that is known, the worst outcome."""
        outcome = self._worst.trace.get("outcome")
        return self.policy.header | ({OUTCOME_HEADER: outcome} if outcome else {})

    @property
    def _worst(self) -> Reply:
        replies = [answer.reply for answer in self.answers]
        known = [reply for reply in replies if reply.trace.get("outcome") in _WORST]
        return min(known, key=lambda reply: _WORST.index(reply.trace["outcome"]), default=replies[0])

    def _log(self) -> None:
        record, usage, worst = self.call.record, self.usage or {}, self._worst
        record.tell(worst.trace)
        record.finish_reason = worst.finish_reason
        record.prompt_tokens, record.completion_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")


def _refusal(error: RefusedAnswerError) -> AIMessage:
    """The message that says no, where the model is set to raise: to a client a block is an answer."""
    if not isinstance(error.raw_message, AIMessage):
        raise error
    return error.raw_message
