"""JSON over HTTP through the openai client: one attempt, a deadline, errors of ours.

The openai package brings its own HTTP client, another one in version 2 than in 3, so everything that talks HTTP
here goes through it and no second client is needed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import anyio
import anyio.to_thread

from tta_middleware.aio.per_loop import PerLoop
from tta_middleware.errors import (
    ConfigurationError,
    InvalidVerdictError,
    ModerationError,
    ModerationUnavailableError,
)
from tta_middleware.moderation.failures import from_openai
from tta_middleware.policy.verdicts import encodable

if TYPE_CHECKING:
    import openai
    from openai._types import RequestOptions


class QuietText(str):
    """A text whose ``repr`` shows its length only: the openai client logs request bodies at DEBUG."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{len(self)} characters>"

    @classmethod
    def of(cls, text: str) -> QuietText:
        """``text``, with half surrogate pairs replaced: they have no UTF-8 form."""
        return cls(encodable(text))


NO_COPY = (
    "a moderator that holds connections, and perhaps a key, cannot be pickled or copied in depth; give it by name "
    "(moderator='openai'), or make it in the process that uses it"
)


class Transport:
    """Posts JSON to one server, with one openai client per event loop and no retries of its own.

    Args:
        base_url: where paths are appended; None takes OPENAI_BASE_URL or the public API.
        api_key: None takes the environment variable ``key_variable`` at the first request.
        timeout: seconds from the request to the last byte of the answer.
        key_header: carries the key in place of ``Authorization``.

    Raises:
        ConfigurationError: ``base_url`` is no http(s) URL or ``timeout`` not positive.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        raise ConfigurationError(NO_COPY)

    def __init__(
        self,
        *,
        base_url: str | None,
        api_key: str | None,
        key_variable: str = "OPENAI_API_KEY",
        timeout: float = 10.0,
        key_header: str | None = None,
    ) -> None:
        if base_url is not None and not base_url.startswith(("http://", "https://")):
            raise ConfigurationError("base_url must begin with http:// or https://")
        if not timeout > 0.0:
            raise ConfigurationError(f"timeout must be above 0 seconds, not {timeout}")
        self._base_url = base_url
        self._api_key = api_key
        self._key_variable = key_variable
        self._timeout = timeout
        self._key_header = key_header
        self._imported = False
        self._clients = PerLoop(self._client, lambda client: client.close())
        # Without the name and password that a URL may hold: this stands in errors and logs.
        self.where = urlsplit(base_url).netloc.rpartition("@")[2] if base_url else "the OpenAI API"

    async def post(self, path: str, body: Mapping[str, Any], *, query: Mapping[str, str] | None = None) -> Any:
        """The decoded JSON answer.

        Raises:
            ConfigurationError: there is no key.
            ModerationUnavailableError: worth a retry.
            ModerationRejectedError: not worth one.
            InvalidVerdictError: the answer is not JSON.
        """
        client = await self._open()
        outcome: str | ModerationError = ModerationUnavailableError(
            f"{self.where} did not answer within {self._timeout} s", cause="timeout"
        )
        with anyio.move_on_after(self._timeout):
            outcome = await self._send(client, path, body, query or {})
        if isinstance(outcome, ModerationError):
            raise outcome
        return self._decode(outcome)

    async def load(self) -> None:
        """Find the key; nothing is sent.

        Raises:
            ConfigurationError: there is none.
        """
        await self._open()

    async def aclose(self) -> None:
        """Close the clients of all event loops; idempotent."""
        await self._clients.aclose()

    async def _open(self) -> openai.AsyncOpenAI:
        # The import takes a second the first time; off the loop, a stream that is being moderated goes on.
        if not self._imported:
            await anyio.to_thread.run_sync(_import_openai)
            self._imported = True
        return await self._clients.get()

    async def _send(
        self, client: openai.AsyncOpenAI, path: str, body: Mapping[str, Any], query: Mapping[str, str]
    ) -> str | ModerationError:
        """The body, or our error for what went wrong; returned, so that no openai error is chained to it."""
        import openai

        left = anyio.current_effective_deadline() - anyio.current_time()
        # A redirect would take the text to another server, and a key in a header of its own with it.
        options: RequestOptions = {"params": query, "timeout": max(left, 0.001), "follow_redirects": False}
        if self._key_header:
            options["headers"] = {self._key_header: client.api_key, "Authorization": openai.Omit()}
        try:
            return await client.post(path, cast_to=str, body=dict(body), options=options)
        except openai.APIError as error:
            return from_openai(error, where=self.where, key_variable=self._key_variable)

    def _decode(self, text: str) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            pass
        raise InvalidVerdictError(
            f"{self.where} answered {len(text)} characters that are not JSON; check base_url and proxies"
        )

    def _client(self) -> openai.AsyncOpenAI:
        import openai

        key = self._api_key or os.environ.get(self._key_variable)
        if not key:
            raise ConfigurationError(
                f"no API key for {self.where}: set {self._key_variable} or pass api_key= "
                "(a server that asks for none takes any text)"
            )
        return openai.AsyncOpenAI(api_key=key, base_url=self._base_url, timeout=self._timeout, max_retries=0)


def _import_openai() -> None:
    import openai  # noqa: F401
