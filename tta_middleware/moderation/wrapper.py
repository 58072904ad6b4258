"""What all wrappers around a moderator have in common."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from tta_middleware.policy.verdicts import verdicts_on
from tta_middleware.protocols import Moderator
from tta_middleware.types import Verdict


class Closing:
    """``async with`` for anything that has ``aclose``."""

    async def aclose(self) -> None:
        """Release sockets; idempotent."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()


class Wrapper(Closing):
    """Stands in for another moderator under its name, threshold, limits and categories; closing it closes that one."""

    def __init__(self, inner: Moderator) -> None:
        self._inner = inner
        self.name = inner.name
        self.default_threshold = inner.default_threshold
        self.max_characters: int | None = getattr(inner, "max_characters", None)
        self.overlap: int | None = getattr(inner, "overlap", None)
        self.categories: tuple[str, ...] | None = getattr(inner, "categories", None)

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        """The inner moderator's verdicts."""
        return await verdicts_on(self._inner, texts, prompt=prompt)

    async def aclose(self) -> None:
        await self._inner.aclose()
