"""Copies of chat models: a deep copy shares what is loaded, a pickle carries settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

from langchain_core.language_models import BaseChatModel

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
