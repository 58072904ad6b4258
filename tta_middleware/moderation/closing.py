"""``async with`` for what holds sockets."""

from __future__ import annotations

from types import TracebackType
from typing import Self


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
