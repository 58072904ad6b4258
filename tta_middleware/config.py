"""Frozen, validated settings shared by the search, the guard and the public face."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from inspect import signature
from numbers import Integral
from typing import Any, Final, Literal, Self, TypeAlias, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator
from pydantic.fields import FieldInfo

from tta_middleware.errors import ConfigurationError


class Settings(BaseModel):
    """Base of all settings: immutable, no unknown keys, mistakes raised as :class:`ConfigurationError`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise ConfigurationError(explain(type(self).__name__, error, type(self).model_fields)) from None

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            refuse_truth_values(given, cls.model_fields)
        return given

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with ``update`` in it, checked as by the constructor; pydantic's own takes anything for a setting.

        Raises:
            ConfigurationError: there is no such setting, or its value is unusable.
        """
        if not update:
            return super().model_copy(deep=deep)
        kept = {name: getattr(self, name) for name in self.model_fields_set}
        checked = type(self)(**kept | dict(update))
        return super().model_copy(update={name: getattr(checked, name) for name in update}, deep=deep)


def explain(name: str, error: ValidationError, known: Collection[str] = ()) -> str:
    """One line per mistake; the offending value is left out, since it may be a secret."""
    lines = []
    for item in error.errors(include_url=False, include_input=False):
        where = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = f"unknown setting; {nearest(where, known)}"
        elif item["type"] in ("tuple_type", "list_type"):
            message = 'give a list, such as ["..."]'
        lines.append(f"{name}.{where}: {message}" if where else f"{name}: {message}")
    return "; ".join(lines)


_LIKE: Final = 0.7
"""How much of a name has to be that of another for it to be a slip; below that `temperature` is like `moderator`."""


def nearest(name: str, known: Collection[str]) -> str:
    """What to write instead of a name that is not known."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=_LIKE)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(known))}"


def refuse_unknown(
    owner: str, given: Iterable[str], known: Collection[str], advice: Mapping[str, str] | None = None
) -> None:
    """Refuse settings that ``owner`` does not have, since one that is ignored is believed to be in force.

    Args:
        advice: what to write instead of names that users are likely to try.

    Raises:
        ConfigurationError: one of ``given`` is not ``known``; names the nearest that is.
    """
    for name in given:
        if name not in known:
            instead = (advice or {}).get(name) or nearest(name, known)
            raise ConfigurationError(f"{owner} has no setting {name!r}; {instead}")


def refuse_truth_values(given: Mapping[str, Any], fields: Mapping[str, FieldInfo]) -> None:
    """Refuse ``True`` where a number is meant: pydantic takes it for 1, and a threshold of 1 flags nothing.

    Raises:
        ConfigurationError: a setting that takes numbers and no truth values is given one, by itself or in a mapping.
    """
    for name in given.keys() & fields.keys():
        values = given[name].values() if isinstance(given[name], Mapping) else [given[name]]
        taken = set(_kinds_in(fields[name].annotation))
        if taken & {int, float} and not taken & {bool, Any} and any(isinstance(value, bool) for value in values):
            raise ConfigurationError(f"{name} takes a number, not True or False")


def _kinds_in(annotation: Any) -> Iterator[Any]:
    """The kinds of values that an annotation is made of; what a function takes is none."""
    inner = () if get_origin(annotation) is Callable else get_args(annotation)
    if not inner:
        yield annotation
    for one in inner:
        yield from _kinds_in(one)


def check_takes_one(what: str, function: Callable[..., Any], instead: str) -> None:
    """Whether a function can be called with one argument, which shows at the first flagged answer otherwise.

    Raises:
        ConfigurationError: it cannot; ``instead`` is what to write.
    """
    try:
        taken = signature(function)
    except (TypeError, ValueError):  # a builtin, which does not tell
        return
    try:
        taken.bind(None)
    except TypeError as error:
        raise ConfigurationError(f"{what} is called with one argument, such as {instead}: {error}") from None


def check_count(name: str, number: object) -> None:
    """Whether this is None or a whole number from 1 on.

    Raises:
        ConfigurationError: it is not.
    """
    if number is not None and (isinstance(number, bool) or not isinstance(number, Integral) or int(number) < 1):
        raise ConfigurationError(f"{name} is a whole number from 1 on, not {number!r:.40}")


class Budget(Settings):
    """What one answer may cost, the base answer included; the first limit reached ends the search.

    Attributes:
        generations: answers decoded. The paper's K = 10 base points with N = 8 probes between two of them come
            to 82.
        generated_tokens: tokens decoded over all of them.
        moderation_calls: requests to the moderator; a list of texts is one request.
        seconds: wall time from the moment when the model is loaded, time in which a slow consumer is waited for
            included. It also cuts a decode, a moderation call and the preparation of a repair that are under way;
            nothing but the fallback begins after it.
    """

    generations: PositiveInt = 82
    generated_tokens: PositiveInt | None = None
    moderation_calls: PositiveInt | None = None
    seconds: PositiveFloat | None = None


class Windows(Settings):
    """How a streaming answer is cut into windows that are checked one by one; lengths are in characters.

    Attributes:
        first: length of the first window; small, for a fast first token.
        largest: each window is twice as long as the one before it, up to this length.
        context: how much of the text before a window is sent along, so that a phrase which lies across two windows is
            seen whole and calls stay linear in the length of the answer. The last check sees all of the answer.
        in_flight: most checks that are open at once. A slower moderator gets larger windows instead of more calls.
        ahead: decoding pauses while this much text waits to be checked or taken by the consumer.
    """

    first: PositiveInt = 48
    largest: PositiveInt = 384
    context: PositiveInt = 2000
    in_flight: PositiveInt = 4
    ahead: PositiveInt = 4000

    @model_validator(mode="after")
    def _first_within_largest(self) -> Self:
        if self.first > self.largest and "largest" not in self.model_fields_set:
            raise ValueError(f"first is above largest, which is {self.largest} unless it is given, too")
        return self

    def over_all(self) -> Windows:
        """These windows, each of which brings all the text before it."""
        return self.model_copy(update={"context": 2**40})


ReasoningMode: TypeAlias = Literal["hide", "show", "off"]
"""What becomes of a model's thoughts: ``show`` gives them out once they are checked, ``hide`` keeps them back, ``off``
has the model answer without any."""


class Reasoning(Settings):
    """How a model that thinks before it answers is let think.

    Attributes:
        max_tokens: after so many the thought is closed, and the model answers; None leaves it the answer's own limit.
        template: arguments of the chat template, such as ``enable_thinking`` or ``reasoning_effort``.
    """

    mode: ReasoningMode = "hide"
    max_tokens: PositiveInt | None = None
    template: Mapping[str, Any] = Field(default_factory=dict)
