"""Copies of chat models: a deep copy shares what is loaded, a pickle carries settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Self

from langchain_core.language_models import BaseChatModel
from pydantic import ValidationError

from tta_middleware.chat_model.call_settings import check_settings, with_timeout, with_usual_names
from tta_middleware.config import explain
from tta_middleware.errors import ConfigurationError

_PARTS = (
    "runtime", "model", "moderator", "method", "fallback", "policies", "memory", "cache", "rate_limiter", "callbacks",
    "inner", "repair_model", "replacement", "books",
)  # fmt: skip
"""Settings that may be objects with weights, sockets, locks or state of their own."""


class CopiesSettings(BaseChatModel):
    """A chat model whose deep copies have settings of their own and share everything that these are about.

    A pickle makes its engines and moderators anew where it is opened, by name. An object in their place has to be one
    that pickles; those of this package do, or say what to give instead.
    """

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with all of ``update`` in it, checked as by the constructor; pydantic's takes anything for a setting.

        Raises:
            ConfigurationError: there is no such setting, or its value is unusable.
        """
        copy = super().model_copy(deep=deep)
        if not update:
            return copy
        for name in copy.__dict__.keys() - type(self).model_fields.keys():
            del copy.__dict__[name]  # what LangChain worked out from the settings of before, such as _serialized
        settings = with_timeout(with_usual_names(update), getattr(self, "budget", None))
        check_settings(type(self).__name__, settings, type(self).model_fields)
        given = copy.model_fields_set | settings.keys()
        try:
            type(self).__pydantic_validator__.validate_python({**copy.__dict__, **settings}, self_instance=copy)
        except ValidationError as error:
            raise ConfigurationError(explain(type(self).__name__, error)) from None
        copy.__pydantic_fields_set__ = given
        return copy

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        shared = {} if memo is None else memo
        shared |= {id(part): part for part in self._parts()}
        return super().__deepcopy__(shared)

    def _parts(self) -> Iterator[Any]:
        for name in _PARTS:
            part = getattr(self, name, None)
            if isinstance(part, list):
                yield from part
            elif part is not None:
                yield part
