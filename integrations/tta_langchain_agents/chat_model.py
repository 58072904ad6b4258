"""``GuardedChatModel``: any LangChain chat model, with its answers checked before anyone sees them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Literal, Self, TypeAlias

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import (
    Runnable,
    RunnableBinding,
    RunnableConfig,
    RunnableMap,
    RunnableParallel,
    RunnableSequence,
)
from langchain_core.tools import BaseTool
from pydantic import ConfigDict, Field, SkipValidation, model_validator

from tta_langchain_agents.content import last_human_text, material, own_id, text_only, without_probabilities
from tta_langchain_agents.handover import Handover, StandIn
from tta_langchain_agents.inner import base_model, bound_settings, handlers, model_name, observers, refuse, unobserved
from tta_langchain_agents.ledger import Books
from tta_langchain_agents.quiet import quiet, quiet_stream, quiet_threaded_stream, spanned, without_callbacks
from tta_langchain_agents.stream import WatchedStream, WithheldError
from tta_middleware.aio import bridge
from tta_middleware.aio.streams import Send, owned
from tta_middleware.assembly import Runtime
from tta_middleware.call_text import begins_as_json
from tta_middleware.chat_model import TTAChatModel
from tta_middleware.chat_model.caching import CachesChecked, name_of
from tta_middleware.chat_model.call_settings import refuse_unknown_settings
from tta_middleware.chat_model.copying import CopiesSettings
from tta_middleware.chat_model.ending_batches import EndingBatches
from tta_middleware.chat_model.messages import from_langchain
from tta_middleware.chat_model.quiet import quiet as within_a_guard
from tta_middleware.chat_model.refusal import REFUSAL
from tta_middleware.config import Windows
from tta_middleware.errors import unquoted
from tta_middleware.guard.ledger import Ledger
from tta_middleware.observing import NOBODY, AnswerObserver, Asked, observer
from tta_middleware.policy import StagePolicies
from tta_middleware.registry import check_moderator, check_policies
from tta_middleware.types import SEAM, GuardedAnswer, Trace

Messages = list[BaseMessage]

Ending: TypeAlias = Literal["stop", "length", "content_filter"]

_ENDINGS: Final[Mapping[str, Ending]] = {"length": "length", "max_tokens": "length", "content_filter": "content_filter"}
"""Reasons of providers that telemetry tells apart from a natural end."""


class GuardedChatModel(CachesChecked, CopiesSettings, EndingBatches, BaseChatModel):
    """A chat model whose messages are checked, text, reasoning and tool calls, before they leave it.

    The inner model is called without callbacks, so what it says raw reaches no callback, event stream or tracer; its
    own callbacks, tags and metadata move to this model.

    Attributes:
        inner: a chat model, or one with tools bound.
        moderator: ``local``, ``openai``, or a Moderator.
        policy: a threshold, thresholds per category, a Policy, or StagePolicies.
        on_flagged: ``block`` gives the policy's notice, ``repair`` hands over to ``repair_model``, ``replace`` gives
            the moderated text of ``replacement``, ``raise`` raises UnsafeAnswerError. None takes the one that
            ``repair_model`` or ``replacement`` is for, else ``block``.
        release: ``window`` streams text as it is checked, cut as in Windows; ``end`` holds it until all was checked.
        streaming: True makes ``invoke`` stream to callbacks, too; False makes ``stream`` give one piece.
        books: told of every call; for the agent middleware.

    Raises:
        ConfigurationError: through pydantic's ValidationError, when a value is unknown or does not fit another.
    """

    model_config = ConfigDict(hide_input_in_errors=True)  # settings may hold a key

    inner: Any = Field(exclude=True, repr=False)
    moderator: Any = "local"
    policy: Any = None
    on_flagged: Literal["block", "repair", "replace", "raise"] | None = None
    repair_model: Any = Field(None, exclude=True, repr=False)
    replacement: Any = Field(None, exclude=True, repr=False)
    release: Literal["window", "end"] | Windows = "window"
    streaming: bool | None = None
    runtime: Runtime = Field(default_factory=Runtime, exclude=True, repr=False)
    books: SkipValidation[Books | None] = Field(None, exclude=True, repr=False)

    @model_validator(mode="before")
    @classmethod
    def _known_settings(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            refuse_unknown_settings(cls.__name__, given, cls.model_fields)
        return given

    @model_validator(mode="after")
    def _usable(self) -> Self:
        check_moderator(self.moderator, None)
        check_policies(self.moderator, StagePolicies.of(self.policy))
        self._handover()
        return self

    @model_validator(mode="after")
    def _take_over(self) -> Self:
        """The inner model's observers and its cache become this model's: what is raw is neither observed nor stored."""
        inner = self.base
        self.tags = self.tags or inner.tags
        self.metadata = {**(inner.metadata or {}), **(self.metadata or {})}
        self.disable_streaming = self.disable_streaming or inner.disable_streaming
        self.profile = self.profile or inner.profile
        self.callbacks = [*handlers(self.callbacks), *observers(self.inner)] or None
        self.cache = inner.cache if self.cache is None else self.cache
        self.inner = unobserved(self.inner)
        return self

    @property
    def base(self) -> BaseChatModel:
        """The chat model under whatever is bound to it.

        Raises:
            ConfigurationError: there is none.
        """
        return base_model(self.inner)

    @property
    def model_name(self) -> str:
        """The inner model's name, which LangChain's strategies for structured output go by."""
        return model_name(self.base)

    @property
    def _llm_type(self) -> str:
        return "tta-guarded-chat-model"

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        base = self.base
        return {
            **base._identifying_params,
            "inner_type": base._llm_type,
            "bound": bound_settings(self.inner),
            "moderator": self.moderator if isinstance(self.moderator, str) else type(self.moderator).__name__,
            "policy": StagePolicies.of(self.policy).model_dump(),
            "on_flagged": self._handover().action,
        }

    def _decisive(self, stop: list[str] | None, overrides: Mapping[str, Any]) -> Mapping[str, Any]:
        moderator = self.runtime.moderator(self.moderator)
        return {
            "inner": self.base._get_llm_string(stop, **(bound_settings(self.inner) | dict(overrides))),
            "moderator": (name_of(self.moderator), moderator.name, moderator.default_threshold),
            "policy": StagePolicies.of(self.policy).with_default(moderator.default_threshold).model_dump(),
            "on_flagged": self._handover().action,
            "repair_model": self.repair_model._get_llm_string() if self.repair_model else None,
            "replacement": name_of(self.replacement),
            "release": self.release,
        }

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return self.base._get_ls_params(stop=stop, **kwargs)

    def bind_tools(
        self, tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool], **kwargs: Any
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """This guard around the inner model with tools bound."""
        return self.model_copy(update={"inner": self.inner.bind_tools(tools, **kwargs)}).bind()

    def with_structured_output(
        self, schema: dict[str, Any] | type, *, include_raw: bool = False, **kwargs: Any
    ) -> Runnable[LanguageModelInput, Any]:
        """As the inner model asks for it and reads it, by any ``method`` that it knows, with this guard in between."""
        asked, *parsers = _steps(self.base.with_structured_output(schema, include_raw=include_raw, **kwargs))
        if isinstance(asked, RunnableParallel):
            asked = asked.steps__["raw"]
        if not parsers or not isinstance(asked, RunnableBinding):
            return super().with_structured_output(schema, include_raw=include_raw, **kwargs)
        guarded = self.model_copy(update={"inner": self.inner.bind(**bound_settings(asked))}).bind()
        return RunnableSequence(RunnableMap(raw=guarded) if include_raw else guarded, *parsers)

    def invoke(
        self,
        input: LanguageModelInput,  # noqa: A002
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> AIMessage:
        with spanned():
            return super().invoke(input, config, **kwargs)

    async def ainvoke(
        self,
        input: LanguageModelInput,  # noqa: A002
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> AIMessage:
        with spanned():
            return await super().ainvoke(input, config, **kwargs)

    def get_token_ids(self, text: str) -> list[int]:
        return self.base.get_token_ids(text)

    def get_num_tokens(self, text: str) -> int:
        return self.base.get_num_tokens(text)

    def get_num_tokens_from_messages(self, messages: Messages, tools: Sequence[Any] | None = None) -> int:
        """The inner model's count, by its own tokenizer."""
        return self.base.get_num_tokens_from_messages(messages, tools)

    def _generate(
        self,
        messages: Messages,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        call = self._call(messages, stop, kwargs)
        with call.observed(stream=False):
            try:
                with quiet():
                    message = self.inner.invoke(messages, without_callbacks(), stop=stop, **kwargs)
            except Exception as error:
                if bridge.run(partial(call.ledger.shows, error)):
                    raise
                raise unquoted("the model", error) from None
            return _result(bridge.run(partial(call.checked, message)))

    async def _agenerate(
        self,
        messages: Messages,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        call = self._call(messages, stop, kwargs)
        with call.observed(stream=False):
            try:
                with quiet():
                    message = await self.inner.ainvoke(messages, without_callbacks(), stop=stop, **kwargs)
            except Exception as error:
                if await call.ledger.shows(error):
                    raise
                raise unquoted("the model", error) from None
            return _result(await call.checked(message))

    def _stream(
        self,
        messages: Messages,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        call = self._call(messages, stop, kwargs)
        chunks = quiet_threaded_stream(lambda: self.inner.stream(messages, without_callbacks(), stop=stop, **kwargs))
        for chunk in bridge.iterate(call.stream(chunks)):
            yield ChatGenerationChunk(message=chunk)

    async def _astream(
        self,
        messages: Messages,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncGenerator[ChatGenerationChunk, None]:
        call = self._call(messages, stop, kwargs)
        chunks = quiet_stream(lambda: self.inner.astream(messages, without_callbacks(), stop=stop, **kwargs))
        async with aclosing(call.stream(chunks)) as checked:
            async for chunk in checked:
                yield ChatGenerationChunk(message=chunk)

    def _call(self, messages: Sequence[BaseMessage], stop: list[str] | None, given: Mapping[str, Any]) -> _Call:
        refuse(given, self.base)
        moderator = self.runtime.moderator(self.moderator)
        policies = StagePolicies.of(self.policy).with_default(moderator.default_threshold)
        ledger = Ledger(moderator, policies.output, around=within_a_guard)
        if self.books is not None:
            self.books.ledgers.append(ledger)
        windows = self.release if isinstance(self.release, Windows) else Windows() if self.release == "window" else None
        provider = str(self._get_ls_params().get("ls_provider") or "langchain")
        stop = stop or bound_settings(self.inner).get("stop")
        return _Call(ledger, self._handover(), messages, self.model_name, windows, provider, stop)

    def _handover(self) -> Handover:
        return Handover.of(self.on_flagged, self.repair_model, self.replacement)


@dataclass(slots=True)
class _Call:
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
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    yield chunk
        except Exception as error:
            if await self.ledger.shows(error):
                raise
            raise unquoted("the model", error) from None

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


def guards_itself(model: Any) -> bool:
    """Whether a model's answers are checked already."""
    while isinstance(model, RunnableBinding):
        model = model.bound
    return isinstance(model, TTAChatModel | GuardedChatModel)


def _steps(runnable: Runnable[Any, Any]) -> list[Runnable[Any, Any]]:
    return runnable.steps if isinstance(runnable, RunnableSequence) else [runnable]


def _result(message: AIMessage) -> ChatResult:
    return ChatResult(generations=[ChatGeneration(message=message)])
