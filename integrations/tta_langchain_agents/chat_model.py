"""``GuardedChatModel``: any LangChain chat model, with its answers checked before anyone sees them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, Literal, Self

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage
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

from tta_langchain_agents.guarded_call import GuardedCall
from tta_langchain_agents.handover import Handover
from tta_langchain_agents.inner import base_model, bound_settings, handlers, model_name, observers, refuse, unobserved
from tta_langchain_agents.ledger import Books
from tta_langchain_agents.quiet import quiet, quiet_stream, quiet_threaded_stream, spanned, without_callbacks
from tta_middleware.aio import bridge
from tta_middleware.assembly import Runtime
from tta_middleware.chat_model import TTAChatModel
from tta_middleware.chat_model.caching import CachesChecked, name_of
from tta_middleware.chat_model.call_settings import check_settings
from tta_middleware.chat_model.copying import CopiesSettings
from tta_middleware.chat_model.ending_batches import EndingBatches
from tta_middleware.chat_model.quiet import quiet as within_a_guard
from tta_middleware.config import Windows
from tta_middleware.errors import unquoted
from tta_middleware.guard.ledger import Ledger
from tta_middleware.policy import StagePolicies
from tta_middleware.registry import check_moderator, check_policies

Messages = list[BaseMessage]


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
            check_settings(cls.__name__, given, cls.model_fields)
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
            async with call.ledger.judged_errors("the model"):
                with quiet():
                    message = await self.inner.ainvoke(messages, without_callbacks(), stop=stop, **kwargs)
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

    def _call(self, messages: Sequence[BaseMessage], stop: list[str] | None, given: Mapping[str, Any]) -> GuardedCall:
        refuse(given, self.base)
        moderator = self.runtime.moderator(self.moderator)
        policies = StagePolicies.of(self.policy).with_default(moderator.default_threshold)
        ledger = Ledger(moderator, policies.output, around=within_a_guard)
        if self.books is not None:
            self.books.ledgers.append(ledger)
        windows = self.release if isinstance(self.release, Windows) else Windows() if self.release == "window" else None
        provider = str(self._get_ls_params().get("ls_provider") or "langchain")
        stop = stop or bound_settings(self.inner).get("stop")
        return GuardedCall(ledger, self._handover(), messages, self.model_name, windows, provider, stop)

    def _handover(self) -> Handover:
        return Handover.of(self.on_flagged, self.repair_model, self.replacement)


def guards_itself(model: Any) -> bool:
    """Whether a model's answers are checked already."""
    while isinstance(model, RunnableBinding):
        model = model.bound
    return isinstance(model, TTAChatModel | GuardedChatModel)


def _steps(runnable: Runnable[Any, Any]) -> list[Runnable[Any, Any]]:
    return runnable.steps if isinstance(runnable, RunnableSequence) else [runnable]


def _result(message: AIMessage) -> ChatResult:
    return ChatResult(generations=[ChatGeneration(message=message)])
