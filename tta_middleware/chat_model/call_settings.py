"""What a chat model can be told, in its constructor and per call: names, usual other names, and values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from tta_middleware.config import Budget, explain, refuse_truth_values, refuse_unknown
from tta_middleware.errors import ConfigurationError

PER_CALL: Final = (
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
    "bridges",
    "release",
    "windows",
    "prompt_check",
    "reasoning",
    "max_reasoning_tokens",
    "chat_template_kwargs",
)
"""The settings that a call may change."""

ALIASES: Final = {"max_tokens": "max_new_tokens", "model_name": "model", "stop_sequences": "stop"}
"""What other chat models call a setting."""

TOOL_SETTINGS: Final = frozenset({"tools", "tool_choice", "parallel_tool_calls", "response_format"})
"""Call settings that ``bind_tools`` and agents make; the tools are in OpenAI's form."""

IGNORED: Final = frozenset({"ls_structured_output_format", "stream", "stream_usage"})
"""Call settings that LangChain adds for its own use."""

_ADVICE: Final = {
    "threshold": "write policy=0.1",
    "max_completion_tokens": "write max_tokens=...",
    "strict": "write bind_tools(tools, strict=True); decoding is not constrained in either case",
    "enable_thinking": "write reasoning='off', or chat_template_kwargs={'enable_thinking': ...}",
    "reasoning_effort": "write chat_template_kwargs={'reasoning_effort': ...}",
    "functions": "write bind_tools(tools)",
    "function_call": "write bind_tools(tools, tool_choice=...)",
    "max_retries": "a local model is not asked again; how often the moderator is, its own settings say "
    "(tta_middleware.moderation.stack.production_moderator)",
    "request_timeout": "write timeout=60, or budget={'seconds': 60}",
    "base_url": "only moderators have one: moderator=OpenAIModerator(base_url=...)",
    "api_key": "only moderators have one: moderator=OpenAIModerator(...), or OPENAI_API_KEY",
}


_OF_THE_MODEL: Final = ("moderator", "policies", "streaming", "device", "dtype", "allow_download", "engine_options")

_CALL_ADVICE: Final = {
    **_ADVICE,
    "max_concurrency": "write batch(..., config={'max_concurrency': ...})",
    "n": "ask several times, such as batch([question] * 3); of a server n is understood",
    "logprobs": "they are given nowhere: probabilities would tell of words that were withheld",
    **{name: f"that is the model's: write model.model_copy(update={{{name!r}: ...}})" for name in _OF_THE_MODEL},
}


def with_usual_names(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under this package's names; ``timeout`` becomes the budget's seconds.

    Raises:
        ConfigurationError: a setting is given under both of its names, with two values.
    """
    settings = dict(given)
    for other, name in ALIASES.items():
        if other in settings:
            value = settings.pop(other)
            if settings.setdefault(name, value) != value:
                raise ConfigurationError(f"{other} is another name of {name}; give one of them")
    return settings


def with_timeout(settings: dict[str, Any], default: Budget | None = None) -> dict[str, Any]:
    """Settings in which ``timeout``, in seconds, is a limit of the budget.

    Raises:
        ConfigurationError: the budget that is given has another limit of seconds.
    """
    seconds = settings.pop("timeout", None)
    if seconds is None:
        return settings
    budget = settings.get("budget")
    given = dict(budget) if isinstance(budget, Mapping) else budget.model_dump() if budget else {}
    if given.get("seconds") not in (None, seconds):
        raise ConfigurationError("timeout is another name of the budget's seconds; give one of them")
    base = {} if budget is not None or default is None else default.model_dump()
    return settings | {"budget": {**base, **given, "seconds": seconds}}


def check_settings(owner: str, given: Mapping[str, Any], fields: Mapping[str, FieldInfo]) -> None:
    """Refuse settings that are not known, with advice for what users of chat models try, and True for a number.

    Raises:
        ConfigurationError: there is one.
    """
    refuse_unknown(owner, given, fields, _ADVICE)
    refuse_truth_values(given, fields)


class CallSettings:
    """Checks the settings of calls by the fields of a chat model class, as its constructor does."""

    def __init__(self, model: type[BaseModel]) -> None:
        self._owner = model.__name__
        self._fields = {name: model.model_fields[name] for name in PER_CALL}
        self._adapters = {name: _adapter(field) for name, field in self._fields.items()}

    def check_names(self, given: Mapping[str, Any]) -> None:
        """Whether all are settings of a call.

        Raises:
            ConfigurationError: one is not; names the nearest.
        """
        known = {*PER_CALL, *ALIASES, "timeout"}
        refuse_unknown(f"a call of {self._owner}", set(given) - TOOL_SETTINGS - IGNORED, known, _CALL_ADVICE)

    def of(self, given: Mapping[str, Any], budget: Budget) -> dict[str, Any]:
        """The call's settings, checked; None stands for the model's own.

        Args:
            budget: the model's own, of which ``timeout`` changes one limit.

        Raises:
            ConfigurationError: a name is unknown, or a value unusable.
        """
        self.check_names(given)
        settings = with_timeout(with_usual_names(given), budget)
        return {name: self._checked(name, settings[name]) for name in PER_CALL if settings.get(name) is not None}

    def _checked(self, name: str, value: Any) -> Any:
        refuse_truth_values({name: value}, self._fields)
        try:
            return self._adapters[name](value)
        except ValidationError as error:
            raise ConfigurationError(explain(name, error)) from None


def _adapter(field: FieldInfo) -> Callable[[Any], Any]:
    """What pydantic would do with a value for this field."""
    checks = (field.annotation, *field.metadata)
    kind: Any = Annotated[checks] if field.metadata else field.annotation
    return TypeAdapter(kind).validate_python
