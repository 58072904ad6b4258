"""``TTAChatModel``: a local model behind a guard, as an ordinary LangChain chat model."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from pydantic import ConfigDict, Field, model_validator

from tta_middleware.aio import bridge
from tta_middleware.aio.streams import Send, owned
from tta_middleware.assembly import GuardSettings, Runtime
from tta_middleware.chat_model.announce import Run, announce
from tta_middleware.chat_model.caching import CachesChecked, digest, name_of
from tta_middleware.chat_model.call_settings import (
    PER_CALL,
    CallSettings,
    check_settings,
    with_timeout,
    with_usual_names,
)
from tta_middleware.chat_model.copying import CopiesSettings
from tta_middleware.chat_model.ending_batches import EndingBatches
from tta_middleware.chat_model.fallbacks import as_fallback
from tta_middleware.chat_model.fields import (
    FallbackSetting,
    MethodSetting,
    ModelSetting,
    ModeratorSetting,
    PolicyFileSetting,
    StopStrings,
)
from tta_middleware.chat_model.messages import from_langchain
from tta_middleware.chat_model.quiet import begun_quietly
from tta_middleware.chat_model.reading import AnswerReader, reading_of
from tta_middleware.chat_model.refusal import as_langchain_errors
from tta_middleware.chat_model.structured import JsonQuality, Schema, asks_for_json, json_output, with_response_format
from tta_middleware.chat_model.token_counts import CountsTokens
from tta_middleware.chat_model.tools import (
    CallQuality,
    Tool,
    ToolChoice,
    ToolUse,
    call_ids,
    describe,
    resolve_tool_choice,
    tool_names,
)
from tta_middleware.config import Budget, Reasoning, ReasoningMode, Windows
from tta_middleware.defaults import DEFAULT_METHOD
from tta_middleware.errors import ConfigurationError
from tta_middleware.guard.context import last_user_text
from tta_middleware.guard.events import Finished, Released, RepairFinished, RepairStarted, RepairStep, StreamEvent
from tta_middleware.guard.guard import Guard, Release
from tta_middleware.guard.quality import QualityGate
from tta_middleware.guard.settings import BRIDGES, PromptCheck
from tta_middleware.policy import StagePolicies
from tta_middleware.policy.file import policies_for
from tta_middleware.policy.verdicts import load
from tta_middleware.protocols import Engine, Moderator, Quality
from tta_middleware.registry import check_moderator, check_options, check_policies
from tta_middleware.types import Message, Sampling, as_asked, stop_strings


class TTAChatModel(CachesChecked, CopiesSettings, EndingBatches, CountsTokens, BaseChatModel):
    """A chat model whose answers are checked before anyone sees them, and repaired when they are flagged.

    Everything is loaded at the first call. Any setting below but ``moderator``, ``policies`` and the
    loading options can be given per call (``model.invoke(..., policy=0.3)``), bound (``model.bind(method="tsa")``) or
    made configurable (``configurable_fields``). ``max_tokens``, ``model_name``, ``stop_sequences`` and ``timeout``
    (the budget's seconds), as other chat models call them, are understood; any other name is refused.

    Attributes:
        model: ``smollm2``, a local folder, a Hugging Face id, or an Engine.
        moderator: ``local``, ``openai``, ``self`` (this very model judges its answers), ``guard:MODEL`` (another one
            does), several with ``+`` between them, a Moderator, or any object with a ``moderate`` of texts.
        method: how a flagged answer is repaired: ``race``, ``noise``, ``resample``, ``tsa``, ``none``, or a Method.
        policy: a threshold, thresholds per category, a Policy, StagePolicies, or a name in ``policies``.
        policies: a TOML or YAML file of named policies, which is read anew when it changes; its ``default``, if there
            is one, is in force where ``policy`` is not given.
        max_new_tokens: most tokens of an answer.
        temperature: 0 answers greedily.
        top_p: nucleus mass that is sampled from.
        stop: an answer ends before the first of these; one string, or several.
        seed: fixes what is sampled, of answers and of repairs; None draws one for every call, and the trace says which.
        budget: what one answer may cost, its repair included.
        fallback: ``refuse``, ``raise``, a function of the messages, async or not, or a Runnable from messages to text
            or a message; its text is moderated, too.
        release: ``window`` streams text as it is checked, window by window, and repairs a late flag by going on from
            what has left; ``end`` holds the answer until all of it was checked. Calls that do not stream are always
            answered whole.
        streaming: True makes ``invoke`` stream to callbacks, too; False makes ``stream`` give one piece.
        windows: how a streaming answer is cut.
        bridges: turns of phrase that may lead from what has left to something safe; none where it is empty.
        prompt_check: whether the prompt is moderated, too, by the policy's ``prompt`` stage: ``user`` the last user
            turn, ``all`` every message, ``off``.
        reasoning: what becomes of the thoughts of a model that thinks before it answers (docs/reasoning.md): ``show``
            gives them out, once they are checked, as reasoning blocks; ``hide`` keeps them back; ``off`` has it answer
            without any. The message's content is the answer alone.
        max_reasoning_tokens: after so many the thought is closed, and the model answers.
        chat_template_kwargs: arguments of the model's chat template, such as ``enable_thinking`` or
            ``reasoning_effort``; one that it does not read is refused.
        device: where the model runs.
        dtype: the numbers it runs in.
        allow_download: whether a Hugging Face id may be fetched from the hub.
        engine_options: further settings of the engine by name, such as ``{"device_map": "auto"}``; see
            :class:`~tta_middleware.engines.transformers.TransformersEngine`.

    Raises:
        ConfigurationError: through pydantic's ValidationError, when a value is out of range or a name unknown.
    """

    # Settings may hold a server's key, which pydantic's errors would show.
    model_config = ConfigDict(hide_input_in_errors=True)

    model: ModelSetting = "smollm2"
    moderator: ModeratorSetting = "local"
    method: MethodSetting = DEFAULT_METHOD
    policy: Any = None
    policies: PolicyFileSetting = None
    max_new_tokens: int = Field(256, ge=1)
    temperature: float = Field(0.0, ge=0.0, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    stop: StopStrings | None = None
    seed: int | None = None
    budget: Budget = Field(default_factory=Budget)
    fallback: FallbackSetting = "refuse"
    release: Release = "window"
    streaming: bool | None = None
    windows: Windows = Field(default_factory=Windows)
    bridges: tuple[str, ...] = BRIDGES
    prompt_check: PromptCheck = "off"
    reasoning: ReasoningMode = "hide"
    max_reasoning_tokens: int | None = Field(None, ge=1)
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    device: str = "auto"
    dtype: str = "auto"
    allow_download: bool = False
    engine_options: dict[str, Any] = Field(default_factory=dict, repr=False)
    runtime: Runtime = Field(default_factory=Runtime, exclude=True, repr=False)

    @model_validator(mode="before")
    @classmethod
    def _known_settings(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        settings = with_timeout(with_usual_names(given))
        check_settings(cls.__name__, settings, cls.model_fields)
        return settings

    @model_validator(mode="after")
    def _usable_policy(self) -> TTAChatModel:
        check_moderator(self.moderator, self.model)
        check_policies(self.moderator, self._stages(self.policy))
        if self._loading:
            check_options(self.model, self._loading)
        return self

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
        method = self.runtime.method(self.method)
        return {
            "model": self._model_name,
            "moderator": self.moderator if isinstance(self.moderator, str) else self._moderator.name,
            "method": repr(method) if method else "none",
            "policy": self.policy if isinstance(self.policy, str) else self._stages(self.policy).model_dump(),
            "budget": self.budget.model_dump(),
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stop": self.stop,
            "seed": self.seed,
            "fallback": self.fallback if isinstance(self.fallback, str) else type(self.fallback).__name__,
            "release": self.release,
            "windows": self.windows.model_dump(),
            "bridges": self.bridges,
            "prompt_check": self.prompt_check,
            "reasoning": self.reasoning,
            "max_reasoning_tokens": self.max_reasoning_tokens,
            "chat_template_kwargs": self.chat_template_kwargs,
        }

    def _decisive(self, stop: list[str] | None, overrides: Mapping[str, Any]) -> Mapping[str, Any]:
        settings = self._settings({**overrides, "stop": stop} if stop else overrides)
        model, moderator = settings["model"], self._moderator
        return settings | {
            "model": (self.runtime.hash(model), model if isinstance(model, str) else name_of(model)),
            # Options may hold a server's key; a cache keeps what stands here, and tracers what stands in ``repr``.
            "loading": (self.device, self.dtype, digest(repr(sorted(self.engine_options.items())))),
            "moderator": (name_of(self.moderator), moderator.name, moderator.default_threshold),
            "policy": self._stages(settings["policy"]).with_default(moderator.default_threshold).model_dump(),
            "method": self.runtime.method(settings["method"]),
            "quality": self.runtime.gate(model).bounds,
            "fallback": name_of(settings["fallback"]),
            "call": {name: value for name, value in overrides.items() if name not in settings},
        }

    def _pinned(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        # A policy file may change between the key and the answer, which then would be kept under another's key.
        return dict(overrides) | {"policy": self._stages(self._settings(overrides)["policy"])}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        params["ls_provider"] = "tta_middleware"
        call = with_usual_names(kwargs)
        params["ls_model_name"] = call.get("model", self._model_name)
        params["ls_temperature"] = call.get("temperature", self.temperature)
        params["ls_max_tokens"] = call.get("max_new_tokens", self.max_new_tokens)
        return params

    def bind(self, **kwargs: Any) -> Any:
        """This model with settings for every call.

        Raises:
            ConfigurationError: a call has no such setting.
        """
        _call_settings(type(self)).check_names(kwargs)
        return super().bind(**kwargs)

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
        choice = resolve_tool_choice(tool_choice, tool_names(described))
        bound: Runnable[LanguageModelInput, AIMessage] = self.bind(tools=described, tool_choice=choice, **kwargs)
        return bound

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
        call = await self._request(messages, stop, overrides)
        generations: list[ChatGeneration] = []
        with as_langchain_errors(call.notice):
            async with aclosing(call.events(release="end")) as events:
                async for event in events:
                    match event:
                        case Finished(answer):
                            generations.append(ChatGeneration(message=call.reader.read(answer)))
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
        call = await self._request(messages, stop, overrides)
        with as_langchain_errors(call.notice):
            async with aclosing(call.events(release=call.release, reader=reader)) as events:
                async for event in events:
                    match event:
                        case Released(text, channel):
                            for chunk in call.reader.feed(text, channel):
                                yield ChatGenerationChunk(message=chunk)
                        case Finished(answer):
                            for chunk in call.reader.finish(answer):
                                yield ChatGenerationChunk(message=chunk)
                        case _:
                            await announce(event, run)

    async def _request(
        self, messages: list[BaseMessage], stop: list[str] | None, overrides: Mapping[str, Any]
    ) -> _Call:
        settings = self._settings({**overrides, "stop": stop} if stop else overrides)
        seed = secrets.randbits(31) if settings["seed"] is None else settings["seed"]
        settings["seed"] = seed
        sampling = Sampling(
            max_new_tokens=settings["max_new_tokens"],
            temperature=settings["temperature"],
            top_p=settings["top_p"],
            seed=seed,
            stop=stop_strings(settings["stop"] or ()),
        )
        wanted = overrides.get("response_format")
        turns, parsed = from_langchain(with_response_format(messages, wanted)), asks_for_json(wanted)
        engine, parallel = self._engine(settings["model"]), overrides.get("parallel_tool_calls")
        use = await ToolUse.of(engine, overrides.get("tools") or (), overrides.get("tool_choice"), parallel=parallel)
        stages = self._stages(settings["policy"])
        notice = stages.output.notice_for(last_user_text(as_asked(turns)))
        reader = AnswerReader(use, call_ids(turns), notice, parsed=parsed)
        guard = self._guard(settings, stages, use, parsed=parsed)
        return _Call(guard, turns, sampling, use, reader, settings["release"], notice)

    def _settings(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """This model's per-call settings with the call's own on top."""
        settings = _call_settings(type(self))
        return {name: getattr(self, name) for name in PER_CALL} | settings.of(overrides, self.budget)

    @property
    def _moderator(self) -> Moderator:
        return self.runtime.moderator(self.moderator, self._engine(self.model))

    def _engine(self, model: Any) -> Engine:
        return self.runtime.engine(model, **self._loading)

    @property
    def _loading(self) -> dict[str, Any]:
        """What an engine that is asked for by name is told: no setting that nobody made, which it may not have."""
        own = {"device": self.device, "dtype": self.dtype, "allow_download": self.allow_download}
        fields = type(self).model_fields
        return {name: value for name, value in own.items() if value != fields[name].default} | self.engine_options

    def _guard(self, settings: Mapping[str, Any], stages: StagePolicies, use: ToolUse | None, *, parsed: bool) -> Guard:
        bridges = () if parsed else settings["bridges"]
        return self.runtime.guard_for(
            GuardSettings(
                model=settings["model"],
                loading=self._loading,
                moderator=self.moderator,
                method=settings["method"],
                policy=stages,
                budget=settings["budget"],
                fallback=as_fallback(settings["fallback"]),
                seed=settings["seed"],
                bridges=bridges,
                windows=settings["windows"],
                prompt_check=settings["prompt_check"],
                reasoning=Reasoning(
                    mode=settings["reasoning"],
                    max_tokens=settings["max_reasoning_tokens"],
                    template=settings["chat_template_kwargs"],
                ),
                judged=partial(_quality, use, bridges, parsed) if use or parsed else None,
                reading=reading_of(use),
            )
        )

    def _stages(self, policy: Any) -> StagePolicies:
        """The policies in force for ``policy``, as the file has them now."""
        return policies_for(policy, self.policies)

    def policies_in_force(self, name: str | None = None) -> StagePolicies:
        """The policies of calls that give ``name`` for ``policy``, as the file has them now; None is the model's own.

        Raises:
            ConfigurationError: there is no such name.
        """
        own = self.policy if name is None else name
        return self._stages(own).with_default(self.scorer.default_threshold)

    @property
    def scorer(self) -> Moderator:
        """The moderator that calls ask."""
        return self._moderator

    async def aload(self) -> None:
        """Load the model and what the moderator needs now; the first call does it otherwise.

        Raises:
            ModeratorSetupError: the moderator cannot be asked as it is set up: it has no key, say.
            ModelNotFoundError, EngineError: a model cannot be loaded.
        """
        # First what takes no time: nobody waits minutes for a model to hear of a key.
        await load(self.scorer)
        await self._engine(self.model).load()

    async def aclose(self) -> None:
        """Free the model and the moderator's sockets; the next call loads them again."""
        await self.runtime.aclose()


@dataclass(frozen=True, slots=True)
class _Call:
    """One request, ready to run."""

    guard: Guard
    turns: list[Message]
    sampling: Sampling
    use: ToolUse | None
    reader: AnswerReader
    release: Release
    notice: str

    def events(self, *, release: Release, reader: asyncio.Task[Any] | None = None) -> AsyncGenerator[StreamEvent, None]:
        tools, opening = (self.use.tools, self.use.opening) if self.use else ((), "")
        events = self.guard.stream(self.turns, self.sampling, tools=tools, opening=opening, release=release)
        return begun_quietly(events if reader is None else _ending_with(reader, events))


async def _ending_with(
    reader: asyncio.Task[Any], events: AsyncGenerator[StreamEvent, None]
) -> AsyncGenerator[StreamEvent, None]:
    """``events`` for a task that reads all of them but may never close this generator, which then lies in a traceback.

    When the task is over, so are they. They are read in a task of their own: a generator can be closed from outside
    only while it stands at a yield, a task can be cancelled wherever it waits.
    """

    async def forward(send: Send[StreamEvent]) -> None:
        async with aclosing(events):
            async for event in events:
                await send(event)

    # The guard's stream has its own room for what is not yet read; here an event waits until the reader takes it.
    async with aclosing(owned(forward, ahead=0, reader=reader)) as read:
        async for event in read:
            yield event


def _quality(use: ToolUse | None, bridges: tuple[str, ...], parsed: bool, gate: QualityGate) -> Quality:
    """The gate of answers that are to be read by a program."""
    prose = JsonQuality(gate) if parsed else gate
    return CallQuality(use, bridges, prose) if use else prose


@cache
def _call_settings(model: type[TTAChatModel]) -> CallSettings:
    return CallSettings(model)
