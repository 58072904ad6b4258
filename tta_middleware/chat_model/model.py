"""``TTAChatModel``: a local model behind a guard, as an ordinary LangChain chat model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, Literal

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from pydantic import Field, field_validator, model_validator

from tta_middleware import bridge
from tta_middleware.chat_model.batching import EndingBatches
from tta_middleware.chat_model.counting import CountsTokens
from tta_middleware.chat_model.events import Run, announce
from tta_middleware.chat_model.messages import from_langchain, to_langchain
from tta_middleware.chat_model.reading import AnswerReader, reading_of
from tta_middleware.chat_model.runtime import Runtime
from tta_middleware.chat_model.structured import Schema, json_output, with_response_format
from tta_middleware.chat_model.tools import (
    CallQuality,
    Tool,
    ToolChoice,
    ToolUse,
    call_ids,
    describe,
    settle_choice,
    tool_names,
    with_tools,
)
from tta_middleware.config import Budget, Windows
from tta_middleware.errors import ConfigurationError
from tta_middleware.events import Finished, Released, RepairFinished, RepairStarted, RepairStep
from tta_middleware.guard import Fallback, Guard, Repair
from tta_middleware.memory import Remembered, RepairMemory
from tta_middleware.optimise.base import Method
from tta_middleware.policies import DEFAULT_NAME, PolicyFile
from tta_middleware.policy import StagePolicies
from tta_middleware.protocols import Engine
from tta_middleware.registry import MODERATORS, check_known, check_policies, resolve_method
from tta_middleware.types import Message, Sampling

DEFAULT_METHOD = "race"
"""What measured best; see the results table in the README."""


class TTAChatModel(EndingBatches, CountsTokens, BaseChatModel):
    """A chat model whose answers are checked before anyone sees them, and repaired when they are flagged.

    Everything is loaded at the first call. Any setting below but ``moderator``, how it streams and the loading options
    can be given per call (``model.invoke(..., policy=0.3)``), bound (``model.bind(method="tsa")``) or made configurable
    (``configurable_fields``).

    Attributes:
        model: ``smollm2``, a local folder, a Hugging Face id, or an Engine.
        moderator: ``local``, ``openai``, or a Moderator.
        method: how a flagged answer is repaired: ``race``, ``noise``, ``resample``, ``tsa``, ``none``, or a Method.
        policy: a threshold, thresholds per category, a Policy, StagePolicies, or a name in ``policies``.
        policies: a TOML or YAML file of named policies, which is read anew when it changes; its ``default``, if there
            is one, is in force where ``policy`` is not given.
        fallback: ``refuse``, ``raise``, an async function of the messages, or a Runnable from messages to text or a
            message; its text is moderated, too.
        release: ``window`` streams text as it is checked, window by window, and repairs a late flag by going on from
            what has left; ``end`` holds the answer until all of it was checked. Calls that do not stream are always
            answered whole.
        windows: how a streaming answer is cut.
        memory: a :class:`~tta_middleware.memory.RepairMemory`: what repaired a prompt before is tried first when the
            same prompt is flagged again. None remembers nothing.
        prompt_check: whether the prompt is moderated, too, by the policy's ``prompt`` stage: ``user`` the last user
            turn, ``all`` every message, ``off``.
        allow_download: whether a Hugging Face id may be fetched from the hub.

    Raises:
        ConfigurationError: through pydantic's ValidationError, when a value is out of range or unknown.
    """

    model: Any = "smollm2"
    moderator: Any = "local"
    method: Any = DEFAULT_METHOD
    policy: Any = None
    policies: Any = None
    max_new_tokens: int = Field(256, ge=1)
    temperature: float = Field(0.0, ge=0.0, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    stop: list[str] | None = None
    seed: int = 0
    budget: Budget = Field(default_factory=Budget)
    fallback: Any = "refuse"
    release: Literal["window", "end"] = "window"
    windows: Windows = Field(default_factory=Windows)
    prompt_check: Literal["off", "user", "all"] = "off"
    memory: Any = Field(None, exclude=True, repr=False)
    device: str = "auto"
    dtype: str = "auto"
    allow_download: bool = False
    runtime: Runtime = Field(default_factory=Runtime, exclude=True, repr=False)

    @field_validator("moderator")
    @classmethod
    def _known_moderator(cls, value: Any) -> Any:
        if isinstance(value, str):
            check_known(MODERATORS, "moderator", value)
        return value

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: Any) -> Any:
        resolve_method(value)
        return value

    @field_validator("policies")
    @classmethod
    def _policy_file(cls, value: Any) -> PolicyFile | None:
        return value if value is None or isinstance(value, PolicyFile) else PolicyFile(value)

    @model_validator(mode="after")
    def _usable_policy(self) -> TTAChatModel:
        check_policies(self.moderator, self._stages(self.policy))
        return self

    @field_validator("memory")
    @classmethod
    def _usable_memory(cls, value: Any) -> Any:
        if value is not None and not isinstance(value, RepairMemory):
            raise ConfigurationError(f"memory is a RepairMemory or None, not {type(value).__name__}")
        return value

    @field_validator("fallback")
    @classmethod
    def _usable_fallback(cls, value: Any) -> Any:
        _fallback(value)
        return value

    @property
    def _llm_type(self) -> str:
        return "tta-chat-model"

    @property
    def _model_name(self) -> str:
        return self.model if isinstance(self.model, str) else str(self.model.model_id)

    @property
    def model_name(self) -> str:
        """What the model is called; LangChain looks for it to tell what a model can do."""
        return self._model_name

    def _answering(self) -> Engine:
        return self._engine(self.model)

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        method = self.runtime.method(self.method, self.model)
        return {
            "model": self._model_name,
            "moderator": self.moderator if isinstance(self.moderator, str) else self.moderator.name,
            "method": repr(method) if method else "none",
            "policy": self.policy if isinstance(self.policy, str) else self._stages(self.policy).model_dump(),
            "budget": self.budget.model_dump(),
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stop": self.stop,
            "seed": self.seed,
        }

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        params["ls_provider"] = "tta_middleware"
        params["ls_model_name"] = kwargs.get("model", self._model_name)
        params["ls_temperature"] = kwargs.get("temperature", self.temperature)
        params["ls_max_tokens"] = kwargs.get("max_new_tokens", self.max_new_tokens)
        return params

    def bind_tools(
        self,
        tools: Sequence[Tool],
        *,
        tool_choice: ToolChoice = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """This model with tools that it may call, if its chat template takes tools (docs/tools.md).

        Args:
            tools: functions, classes, LangChain tools or descriptions in OpenAI's form.
            tool_choice: ``auto`` (None) leaves it to the model; ``any`` (True) or a tool's name makes it call, by
                beginning its answer; ``none`` hides the tools.
            strict: stands in the descriptions, as OpenAI's models read it; decoding is not constrained.
            kwargs: settings of the call. ``parallel_tool_calls=False`` takes the first call of an answer only;
                ``response_format`` asks for JSON, as with OpenAI's models.

        Raises:
            ConfigurationError: ``tool_choice`` names no tool. Whether the model takes tools shows at the first call.
        """
        described = describe(tools, strict=strict)
        return self.bind(tools=described, tool_choice=settle_choice(tool_choice, tool_names(described)), **kwargs)

    def with_structured_output(
        self,
        schema: Schema,
        *,
        method: str = "function_calling",
        include_raw: bool = False,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Answers as instances of ``schema``: a pydantic class, a TypedDict class, or a JSON schema.

        ``function_calling`` makes the model call a tool with the schema's fields, so its chat template must take tools.
        ``json_schema`` and ``json_mode`` work with any model: an instruction, and a parser of what comes. Decoding is
        not constrained, so ``strict`` changes nothing.

        Raises:
            ConfigurationError: an unknown method or setting.
        """
        if unknown := sorted(set(kwargs) - {"strict"}):
            raise ConfigurationError(f"with_structured_output takes method, include_raw and strict, not {unknown[0]!r}")
        if method == "function_calling":
            return super().with_structured_output(schema, include_raw=include_raw)
        return json_output(self, schema, method=method, include_raw=include_raw)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return bridge.run(partial(self._result, messages, stop, run_manager, kwargs))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return await self._result(messages, stop, run_manager, kwargs)

    async def _result(
        self, messages: list[BaseMessage], stop: list[str] | None, run: Run, overrides: Mapping[str, Any]
    ) -> ChatResult:
        """The answer as a whole; a flagged one is replaced from its first word, since nothing has left."""
        guard, turns, sampling, answers = await self._request(messages, stop, overrides)
        generations: list[ChatGeneration] = []
        async with aclosing(guard.stream(turns, sampling, release="end")) as events:
            async for event in events:
                match event:
                    case Finished(answer):
                        generations.append(ChatGeneration(message=answers.read(answer)))
                    case RepairStarted() | RepairStep() | RepairFinished():
                        await announce(event, run)
        return ChatResult(generations=generations)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        yield from bridge.iterate(self._chunks(messages, stop, run_manager, kwargs))

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncGenerator[ChatGenerationChunk, None]:
        # LangChain hands a run manager over only where one task reads to the end; it may not close what it reads.
        reader = asyncio.current_task() if run_manager is not None else None
        async with aclosing(self._chunks(messages, stop, run_manager, kwargs, reader)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _chunks(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None,
        run: Run,
        overrides: Mapping[str, Any],
        reader: asyncio.Task[Any] | None = None,
    ) -> AsyncGenerator[ChatGenerationChunk, None]:
        guard, turns, sampling, answers = await self._request(messages, stop, overrides)
        async with aclosing(guard.stream(turns, sampling, release=self.release, reader=reader)) as events:
            async for event in events:
                match event:
                    case Released(text):
                        for chunk in answers.feed(text):
                            yield ChatGenerationChunk(message=chunk)
                    case Finished(answer):
                        for chunk in answers.finish(answer):
                            yield ChatGenerationChunk(message=chunk)
                    case _:
                        await announce(event, run)

    async def _request(
        self, messages: list[BaseMessage], stop: list[str] | None, overrides: Mapping[str, Any]
    ) -> tuple[Guard, list[Message], Sampling, AnswerReader]:
        settings = self._settings(overrides)
        sampling = Sampling(
            max_new_tokens=settings["max_new_tokens"],
            temperature=settings["temperature"],
            top_p=settings["top_p"],
            seed=settings["seed"],
            stop=tuple(stop or settings["stop"] or ()),
        )
        turns = from_langchain(with_response_format(messages, overrides.get("response_format")))
        engine, parallel = self._engine(settings["model"]), overrides.get("parallel_tool_calls")
        use = await ToolUse.of(engine, overrides.get("tools") or (), overrides.get("tool_choice"), parallel=parallel)
        return self._guard(settings, engine, use), turns, sampling, AnswerReader(use, call_ids(turns))

    def _settings(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """This model's per-call settings with the call's own on top."""
        unknown = sorted(set(overrides) - set(_PER_CALL) - _TOOL_SETTINGS - _IGNORED)
        if unknown:
            raise ConfigurationError(f"unknown call setting {', '.join(unknown)}; known are {', '.join(_PER_CALL)}")
        own = {name: getattr(self, name) for name in _PER_CALL}
        return own | {name: value for name, value in overrides.items() if name in own and value is not None}

    def _engine(self, model: Any) -> Engine:
        return self.runtime.engine(model, device=self.device, dtype=self.dtype, allow_download=self.allow_download)

    def _guard(self, settings: Mapping[str, Any], engine: Engine, use: ToolUse | None) -> Guard:
        gate = self.runtime.gate(settings["model"])
        stages = self._stages(settings["policy"])
        return Guard(
            with_tools(engine, use) if use else engine,
            self.runtime.moderator(self.moderator),
            quality=CallQuality(use, gate=gate) if use else gate,
            policy=stages,
            repair=Repair(
                method=self._method(settings, stages),
                budget=settings["budget"],
                fallback=_fallback(settings["fallback"]),
                seed=settings["seed"],
            ),
            windows=self.windows,
            prompt_check=self.prompt_check,
            reading=reading_of(use),
        )

    def _method(self, settings: Mapping[str, Any], stages: StagePolicies) -> Method | None:
        method = self.runtime.method(settings["method"], settings["model"])
        if method is None or self.memory is None:
            return method
        return Remembered(method, self.memory, self.runtime.scope(settings["model"], stages.repair))

    def _stages(self, policy: Any) -> StagePolicies:
        """The policies in force for ``policy``, as the file has them now."""
        file: PolicyFile | None = self.policies
        if policy is None and file is not None and DEFAULT_NAME in file.names():
            return file.get()
        if not isinstance(policy, str):
            return StagePolicies.of(policy)
        if file is None:
            raise ConfigurationError(f"the policy {policy!r} is a name; set policies= to the file that defines it")
        return file.get(policy)

    async def aclose(self) -> None:
        """Free the model and the moderator's sockets; the next call loads them again."""
        await self.runtime.aclose()


_PER_CALL = (
    "model",
    "max_new_tokens",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "policy",
    "method",
    "budget",
    "fallback",
)

_TOOL_SETTINGS = frozenset({"tools", "tool_choice", "parallel_tool_calls", "response_format"})
"""Call settings that ``bind_tools`` and agents make; the tools are in OpenAI's form."""

_IGNORED = frozenset({"ls_structured_output_format", "stream", "stream_usage"})
"""Call settings that LangChain adds for its own use."""


def _fallback(value: Any) -> Fallback:
    if value in ("refuse", "raise"):
        return value  # type: ignore[no-any-return]
    if isinstance(value, Runnable):
        return partial(_run_fallback, value)
    if callable(value):
        return value  # type: ignore[no-any-return]
    raise ConfigurationError(f"fallback is 'refuse', 'raise', an async function or a Runnable, not {value!r:.40}")


async def _run_fallback(runnable: Runnable[Any, Any], messages: list[Message]) -> str:
    """The runnable's text. Callbacks are cut off, since its raw tokens are not checked yet."""
    output = await runnable.ainvoke(to_langchain(messages), config={"callbacks": []})
    return output.text if isinstance(output, BaseMessage) else str(output)
