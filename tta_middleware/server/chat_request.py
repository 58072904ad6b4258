"""The body of ``POST /v1/chat/completions``: read strictly, and put into LangChain's terms.

A field that is not known is refused, since a client that sends it believes in its effect.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, TypeAlias, TypeVar, get_args

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    HumanMessage,
    InvalidToolCall,
    SystemMessage,
    ToolCall,
    ToolMessage,
)
from langchain_core.messages.tool import invalid_tool_call, tool_call
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from tta_middleware.call_text import message_texts
from tta_middleware.chat_model.messages import REASONING, from_langchain
from tta_middleware.config import nearest
from tta_middleware.guard.context import last_user_text
from tta_middleware.guard.settings import PromptCheck
from tta_middleware.http_api import ApiError
from tta_middleware.types import Message, as_asked

IGNORED: Final = (
    "metadata",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)
"""Fields of OpenAI's that change no answer here."""

NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "audio": (),
    "function_call": (),
    "functions": (),
    "prediction": (),
    "web_search_options": (),
}
"""Fields that are taken with these values only, or with null, since clients send them unasked."""

_INSTEAD: Final = {
    "logprobs": "probabilities would tell of words that were withheld",
    "top_logprobs": "probabilities would tell of words that were withheld",
    "functions": "use tools",
    "function_call": "use tool_choice",
}

LEVELS: Final = 100
"""Nesting that is read; what walks through a value later would fail a few hundred levels down."""

FAULTS: Final = 1_000
"""Faults of one body that are looked through for what to say: each costs ten microseconds, and there may be many."""

_SEEDS: Final = 2**31

_CHECKS: Final[tuple[PromptCheck, ...]] = ("off", "user", "all")
"""From the laxest to the strictest."""


class Body(BaseModel):
    """Base of what is read: no unknown fields, no guesses at types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


R = TypeVar("R", bound=Body)

T = TypeVar("T")

ListOf: TypeAlias = Annotated[list[T], Field(fail_fast=True)]
"""A list that is read up to its first fault, which is the one that is told."""


def text_of_parts(fields: Mapping[str, str]) -> BeforeValidator:
    """Takes a text, or the texts of content parts as one; ``fields`` says which field of each type holds it."""

    def joined(value: Any) -> Any:
        return "".join(_part(part, fields) for part in value) if isinstance(value, list) else value

    return BeforeValidator(joined)


def _part(part: Any, fields: Mapping[str, str]) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    text = part.get(fields.get(kind, "")) if isinstance(kind, str) else None
    if isinstance(text, str):
        return text
    if isinstance(kind, str) and kind not in fields:
        raise ValueError(f"the model reads text only, not {kind[:40]!r}")
    raise ValueError(f"content is a string, or parts such as {{'type': {next(iter(fields))!r}, 'text': ...}}")


Text: TypeAlias = Annotated[str, text_of_parts({"text": "text", "refusal": "refusal"})]


class SystemTurn(Body):
    """Instructions."""

    role: Literal["system", "developer"]
    content: Text
    name: str | None = None

    def message(self) -> BaseMessage:
        return SystemMessage(self.content)


class UserTurn(Body):
    """What the user said."""

    role: Literal["user"]
    content: Text
    name: str | None = None

    def message(self) -> BaseMessage:
        return HumanMessage(self.content)


class Function(Body):
    """A tool's name and the JSON of its arguments."""

    name: str
    arguments: str


class CallOfTool(Body):
    """One call of a tool."""

    id: str
    type: Literal["function"] = "function"
    function: Function
    index: int | None = None

    def read(self) -> ToolCall | InvalidToolCall:
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if nested_deeper(arguments, LEVELS):
            raise _too_deep("the arguments of a tool call")
        if isinstance(arguments, dict):
            return tool_call(name=self.function.name, args=arguments, id=self.id)
        return invalid_tool_call(name=self.function.name, args=self.function.arguments, id=self.id)


class AssistantTurn(BaseModel):
    """What a model said, as any server's client holds it: fields that no model reads again are let by."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    role: Literal["assistant"]
    content: Text | None = None
    refusal: str | None = None
    tool_calls: ListOf[CallOfTool] | None = None
    reasoning_content: Any = None
    reasoning: Any = None

    def message(self) -> BaseMessage:
        calls = [call.read() for call in self.tool_calls or ()]
        thought = next((text for text in (self.reasoning_content, self.reasoning) if isinstance(text, str)), "")
        return AIMessage(
            self.content or self.refusal or "",
            additional_kwargs={REASONING: thought} if thought else {},
            tool_calls=[call for call in calls if call["type"] == "tool_call"],
            invalid_tool_calls=[call for call in calls if call["type"] == "invalid_tool_call"],
        )


class ToolTurn(Body):
    """What a tool gave back."""

    role: Literal["tool"]
    content: Text
    tool_call_id: str
    name: str | None = None

    def message(self) -> BaseMessage:
        return ToolMessage(self.content, tool_call_id=self.tool_call_id, name=self.name)


Turn: TypeAlias = Annotated[SystemTurn | UserTurn | AssistantTurn | ToolTurn, Field(discriminator="role")]


class FunctionDescription(Body):
    """What a model is told of a tool."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool | None = None


class Tool(Body):
    """A tool that the model may call."""

    type: Literal["function"]
    function: FunctionDescription


class StreamOptions(Body):
    """How a stream is sent; obfuscation pads nothing here."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class ModerationMode(Body):
    """``block`` asks for a check that may block; ``score`` for scores."""

    mode: Literal["score", "block"]


class ModerationPolicy(Body):
    """What is asked for the prompt and for the answer."""

    input: ModerationMode | None = None
    output: ModerationMode | None = None


class InlineModeration(Body):
    """Scores of prompt and answer along with the answer; the server's own moderator gives them."""

    model: str
    policy: ModerationPolicy | None = None

    @property
    def blocks_input(self) -> bool:
        asked = self.policy.input if self.policy else None
        return asked is not None and asked.mode == "block"


class Stricter(Body):
    """What a client asks for beyond the operator's policy: lower thresholds for answers, a check of the prompt.

    Attributes:
        threshold: for every category.
        categories: for single ones.
        prompt_check: of the last user turn, or of all turns.
    """

    threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    categories: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(default_factory=dict)
    prompt_check: PromptCheck | None = None


class ChatRequest(Body):
    """See OpenAI's reference; docs/server.md lists what differs."""

    model: str
    messages: Annotated[ListOf[Turn], Field(min_length=1)]
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    tools: ListOf[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    moderation: InlineModeration | None = None
    tta: Stricter | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_what_changes_nothing(cls, given: Any) -> Any:
        return without_what_changes_nothing(given, NEUTRAL)

    @property
    def asks_for_json(self) -> bool:
        """Whether the client is going to parse the answer's text."""
        return self.response_format is not None and self.response_format.get("type") in ("json_object", "json_schema")

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def choices(self, seed: int | None) -> list[ChatRequest]:
        """A request for each choice; with a seed, the client's or this one, each is sampled with one of its own."""
        if self.n is None or self.n == 1:
            return [self]
        own = seed if self.seed is None else self.seed
        seeds = [None if own is None else own + index for index in range(self.n)]
        return [self.model_copy(update={"n": None, "seed": seed}) for seed in seeds]

    @property
    def conversation(self) -> list[BaseMessage]:
        return [turn.message() for turn in self.messages]

    @property
    def turns(self) -> Sequence[Message]:
        """The messages as they are asked: where no user says anything, the last instruction is a user's."""
        return as_asked(from_langchain(self.conversation))

    @property
    def last_user_text(self) -> str:
        return last_user_text(self.turns)

    @property
    def texts(self) -> list[str]:
        """All that the conversation says, calls of tools as they are decoded."""
        return [text for message in self.turns for text in message_texts(message)]

    def settings(
        self, prompt_check: PromptCheck, most_tokens: int | None, own_tokens: int | None = None
    ) -> dict[str, Any]:
        """What a call of a model with this ``prompt_check`` is told; ``own_tokens`` is what it gives unasked.

        Raises:
            ApiError: more tokens are asked for than ``most_tokens``, or twice and differently.
        """
        given = {
            "max_new_tokens": self._tokens(most_tokens, own_tokens),
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": None if self.seed is None else self.seed % _SEEDS,
            "stop": self.stop or None,
            "response_format": self.response_format,
            "chat_template_kwargs": self._template_arguments(),
        }
        given["prompt_check"] = self._prompt_check(prompt_check)
        return {name: value for name, value in given.items() if value is not None}

    def _template_arguments(self) -> dict[str, Any] | None:
        """What the chat template is told; None leaves it to the model's own settings."""
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return {**(self.chat_template_kwargs or {}), **effort} or None

    def _prompt_check(self, own: PromptCheck) -> PromptCheck:
        """The strictest of what the model has and the client asks for.

        Raises:
            ApiError: the client asks for less.
        """
        asked = self.tta.prompt_check if self.tta else None
        if asked is not None and _CHECKS.index(asked) < _CHECKS.index(own):
            raise weakened(f"the prompt check here is {own!r} and cannot be {asked!r}", "tta.prompt_check")
        inline: PromptCheck = "user" if self.moderation is not None and self.moderation.blocks_input else "off"
        return max(own, asked or "off", inline, key=_CHECKS.index)

    def forwarded(self, *, thoughts: bool) -> dict[str, Any]:
        """What another server of this protocol is asked; moderation is this server's affair.

        ``thoughts`` of earlier turns are left out unless the client gets to see any: some servers refuse them.
        """
        kept = set(type(self).model_fields) - {
            "model",
            "messages",
            "n",
            "stream",
            "stream_options",
            "moderation",
            "tta",
        }
        asked = {name: value for name, value in self.model_dump(exclude_none=True).items() if name in kept}
        return asked | {"messages": [_forwarded(turn, thoughts) for turn in self.messages]}

    def _tokens(self, most: int | None, own: int | None) -> int | None:
        asked = {tokens for tokens in (self.max_completion_tokens, self.max_tokens) if tokens is not None}
        if len(asked) > 1:
            raise ApiError(400, "max_tokens is another name of max_completion_tokens; give one", param="max_tokens")
        tokens = next(iter(asked), None)
        if tokens is None and most is not None and own is not None:
            return min(most, own)
        if tokens is not None and most is not None and tokens > most:
            raise ApiError(400, f"at most {most} tokens may be asked for, not {tokens}", param="max_completion_tokens")
        return tokens

    def tool_settings(self) -> dict[str, Any] | None:
        """What ``bind_tools`` is told; None without tools.

        Raises:
            ApiError: a choice among tools that there are not.
        """
        if self.tools:
            tools = [tool.model_dump(exclude_none=True) for tool in self.tools]
            parallel = {} if self.parallel_tool_calls is None else {"parallel_tool_calls": self.parallel_tool_calls}
            return {"tools": tools, "tool_choice": self.tool_choice, **parallel}
        if self.tool_choice not in (None, "auto", "none"):
            raise ApiError(400, "tool_choice needs tools to choose from", param="tool_choice")
        return None


def _forwarded(turn: Turn, thoughts: bool) -> dict[str, Any]:
    """A turn as every server of this protocol knows it."""
    left_out = {"refusal"} if thoughts else {"refusal", "reasoning_content", "reasoning"}
    told = turn.model_dump(exclude_none=True, exclude=left_out)
    if isinstance(turn, AssistantTurn) and not told.get("content"):
        told["content"] = turn.refusal or None
    return told | ({"role": "system"} if turn.role == "developer" else {})


def read_request(kind: type[R], payload: Mapping[str, Any]) -> R:
    """An instance of ``kind``.

    Raises:
        ApiError: a field is missing, unknown or of another kind; says where, never with what.
    """
    if nested_deeper(payload, LEVELS):
        raise _too_deep("the body")
    try:
        return kind.model_validate(payload)
    except ValidationError as error:
        if error.error_count() > FAULTS:
            raise ApiError(400, f"the body has {error.error_count()} faults", code="invalid_value") from None
        errors = error.errors(include_url=False, include_input=False)
        where = _path(errors[0]["loc"])
        # Of a field that may be of several kinds, each of which was tried: the one that says more than the kind.
        told = [one for one in errors if _path(one["loc"]) == where and not one["type"].endswith("_type")]
        first = told[0] if told else errors[0]
        if first["type"] == "extra_forbidden":
            raise _unknown(where, first["loc"], kind) from None
        if first["type"] == "missing":
            message = f"Missing required parameter: '{where}'"
            raise ApiError(400, message, code="missing_required_parameter", param=where) from None
        message = f"Invalid '{where}': {first['msg'].removeprefix('Value error, ')[:300]}"
        raise ApiError(400, message, code="invalid_value", param=where) from None


def nested_deeper(value: Any, most: int) -> bool:
    """Whether a plain value has more than ``most`` levels; of any depth itself."""
    level = [value]
    for _ in range(most + 1):
        level = [child for item in level for child in _children(item)]
    return bool(level)


def _children(item: Any) -> Collection[Any]:
    if isinstance(item, dict):
        return item.values()
    return item if isinstance(item, list) else ()


def _too_deep(what: str) -> ApiError:
    return ApiError(400, f"{what} must not be nested deeper than {LEVELS} levels", code="too_deep")


def weakened(message: str, param: str) -> ApiError:
    """A client asked for less than the operator has; it must not believe that it got it."""
    return ApiError(403, message, code="policy_weakened", param=param)


def without_what_changes_nothing(
    given: Any,
    neutral: Mapping[str, tuple[Any, ...]],
    *,
    ignored: Collection[str] = IGNORED,
    instead: Mapping[str, str] = MappingProxyType({}),
) -> Any:
    """A body without the fields that change no answer here.

    Args:
        neutral: fields that are taken with these values only, or with null.
        ignored: fields that are taken with any value.
        instead: what to do without a field of ``neutral``, where more is to be said than of such fields everywhere.

    Raises:
        ApiError: a field of ``neutral`` has another value.
    """
    if not isinstance(given, Mapping):
        return given
    for name, values in neutral.items():
        if given.get(name) is not None and given[name] not in values:
            raise _unsupported(name, instead.get(name))
    return {name: value for name, value in given.items() if name not in neutral and name not in ignored}


def _unsupported(name: str, hint: str | None = None) -> ApiError:
    """A field of OpenAI's that is not served with this value."""
    hint = hint or _INSTEAD.get(name, "leave it out")
    return ApiError(400, f"'{name}' is not supported here; {hint}", code="unsupported_parameter", param=name)


def _unknown(where: str, location: tuple[int | str, ...], kind: type[BaseModel]) -> ApiError:
    *outer, name = map(str, location)
    if name in _INSTEAD:
        return _unsupported(name)
    # What a part of the body may hold is listed for a slip only: parts of several kinds would be a long list.
    near = nearest(name, _fields(kind, outer))
    hint = near if where == name or near.startswith("did") else "leave it out"
    message = f"Unknown parameter: '{where[:200]}'; {hint}"
    return ApiError(400, message, code="unknown_parameter", param=where[:200])


def _fields(kind: type[BaseModel], outer: Sequence[str]) -> set[str]:
    """The fields of the part of a body that names of parts lead to; what is no name of a part leads nowhere further."""
    kinds = [kind]
    for step in outer:
        found = [one.model_fields[step].annotation for one in kinds if step in one.model_fields]
        kinds = [inner for annotation in found for inner in _models_in(annotation)] or kinds
    return {name for one in kinds for name in one.model_fields}


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def _path(location: tuple[int | str, ...]) -> str:
    """``messages[0].content`` of pydantic's location, without the names of the alternatives it tried."""
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in _steps(location))
    return path.removeprefix(".")


def _steps(location: tuple[int | str, ...]) -> Iterator[int | str]:
    before: int | str = ""
    for at, step in enumerate(location):
        tag = isinstance(before, int) and at == 2 and location[0] == "messages"
        if not tag and not (isinstance(step, str) and (step in ("str", "dict") or "[" in step)):
            yield step
        before = step
