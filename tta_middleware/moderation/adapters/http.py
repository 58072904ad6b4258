"""What adapters of HTTP APIs share: one transport, one retry policy, bounded concurrency."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

from tta_middleware.errors import ConfigurationError
from tta_middleware.moderation.closing import Closing
from tta_middleware.moderation.concurrency import gather
from tta_middleware.moderation.retry import Retrier, RetryPolicy
from tta_middleware.moderation.transport import Transport
from tta_middleware.types import Verdict


class HTTPModerator(Closing):
    """Base of adapters that send one request per text, ``concurrency`` of them side by side.

    Attributes:
        max_characters: the longest text that the API takes; None knows no limit. Longer ones are sent in parts.
    """

    max_characters: int | None = None

    def __init__(self, transport: Transport, retry: RetryPolicy | None, concurrency: int = 8) -> None:
        if concurrency < 1:
            raise ConfigurationError(f"concurrency must be at least 1, not {concurrency}")
        self._transport = transport
        self._retrier = Retrier(retry)
        self._concurrency = concurrency

    async def load(self) -> None:
        """Find the key; nothing is sent.

        Raises:
            ConfigurationError: there is none.
        """
        await self._transport.load()

    async def aclose(self) -> None:
        await self._transport.aclose()

    async def _each(self, texts: Sequence[str], score: Callable[[str], Awaitable[Verdict]]) -> list[Verdict]:
        if not texts:
            return []
        return await gather([partial(score, text) for text in texts], limit=self._concurrency)

    async def _post(self, path: str, body: Mapping[str, Any], query: Mapping[str, str] | None = None) -> Any:
        return await self._retrier.call(partial(self._transport.post, path, body, query=query))
