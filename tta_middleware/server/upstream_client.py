"""What a server behind this one says: one request of OpenAI's protocol, read piece by piece and mistrusted.

Read are text, refusals, thoughts (``reasoning_content`` or ``reasoning``), tool calls, the end and the usage. The rest
is dropped unread: thoughts in other fields, log-probabilities, further choices, vendors' additions.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import anyio

from tta_middleware.aio.per_loop import PerLoop
from tta_middleware.errors import ConfigurationError, UpstreamError
from tta_middleware.moderation.failures import error_code, retry_after
from tta_middleware.moderation.retry import RetryPolicy, delay
from tta_middleware.moderation.transport import QuietText
from tta_middleware.types import valid_text

if TYPE_CHECKING:
    import openai
    from openai._types import RequestOptions

KEY_VARIABLE = "TTA_UPSTREAM_API_KEY"
"""The environment variable of an upstream's key where the settings name neither another one nor a file."""

CONNECT_SECONDS = 10.0
_OPTIONS: RequestOptions = {"follow_redirects": False}
"""A redirect would take the conversation to another server."""

MOST_CHARACTERS = 4_000_000
"""Of one answer, arguments of calls included: a server that never ends must not fill this one's memory."""

FinishReason: TypeAlias = Literal["stop", "length", "tool_calls", "content_filter"]

_REASONS: Mapping[str, FinishReason] = {
    "stop": "stop",
    "eos_token": "stop",
    "stop_sequence": "stop",
    "length": "length",
    "max_tokens": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "content_filter",
}


@dataclass(frozen=True, slots=True)
class CallPiece:
    """A piece of a tool call; pieces of one call have one index."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Piece:
    """What came of an answer.

    Attributes:
        refusal: what the model says in place of an answer.
        thought: what the model thinks; it comes before the piece's text.
        reason: why the answer ended; None while it goes on.
        usage: ``(prompt_tokens, completion_tokens)``.
        thought_tokens: those of the completion that were thought; None where the server does not say.
    """

    text: str = ""
    refusal: str = ""
    thought: str = ""
    calls: tuple[CallPiece, ...] = ()
    reason: FinishReason | None = None
    usage: tuple[int, int] | None = None
    thought_tokens: int | None = None

    @property
    def begins(self) -> bool:
        """Whether something of the answer has come, so that it cannot be asked for anew."""
        return bool(self.text or self.refusal or self.thought or self.calls)


class UpstreamClient:
    """Asks one server.

    Args:
        url: with its path, such as ``http://127.0.0.1:11434/v1``.
        key_variable: environment variable of the key; None takes :data:`KEY_VARIABLE`, and no key where that is unset.
        key_file: a file that holds the key; read anew for every request, so that it can be changed.
        timeout: seconds in which nothing comes.
        retry: how often the beginning of an answer is asked for.

    Raises:
        ConfigurationError: the URL is none, or the key that is named is not there.
    """

    def __init__(
        self,
        url: str,
        *,
        key_variable: str | None = None,
        key_file: Path | None = None,
        timeout: float = 60.0,
        retry: RetryPolicy | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigurationError("upstream must begin with http:// or https://, such as http://127.0.0.1:11434/v1")
        self._url, self._variable, self._file = url, key_variable, key_file
        self._timeout, self._retry = timeout, retry or RetryPolicy(attempts=3)
        self._clients = PerLoop(self._client, lambda client: client.close())
        self._rng = random.Random()  # noqa: S311  spread, not secrecy
        self._key()

    async def ask(self, body: Mapping[str, Any], *, stream: bool) -> AsyncGenerator[Piece, None]:
        """The answer to a request, its last piece with the reason of its end.

        It is asked for again only before anything of it has come. Closing the generator closes the connection.

        Raises:
            UpstreamError: there is none, or it was broken off.
        """
        for attempt in range(1, self._retry.attempts + 1):
            begun = False
            try:
                async with aclosing(self._once(body, stream)) as pieces:
                    async for piece in pieces:
                        begun = begun or piece.begins
                        yield piece
                return
            except UpstreamError as error:
                wait = delay(self._retry, attempt, error.retry_after, self._rng)
                if begun or wait is None or not error.retryable:
                    raise
            await anyio.sleep(wait)

    async def aclose(self) -> None:
        """Close the connections; idempotent."""
        await self._clients.aclose()

    async def _once(self, body: Mapping[str, Any], stream: bool) -> AsyncGenerator[Piece, None]:
        reading = _Reading()
        async with aclosing(self._received(body, stream)) as received:
            async for data in received:
                if piece := reading.piece(data):
                    yield piece
        if reading.reason is None:
            raise UpstreamError("the upstream broke its answer off before its end", cause="broken")

    async def _received(self, body: Mapping[str, Any], stream: bool) -> AsyncGenerator[Any, None]:
        """Bodies and events as they came, decoded; errors as ours and without a word of theirs."""
        import openai

        try:
            client = (await self._clients.get()).copy(api_key=self._key())
        except ConfigurationError as error:  # it was there when the server started
            raise UpstreamError("there is no key for the upstream any more", cause="refused") from error
        found: Exception
        try:
            if not stream:
                yield await client.post("/chat/completions", cast_to=object, body=_quiet(body), options=_OPTIONS)
                return
            events: openai.AsyncStream[object] = await client.post(
                "/chat/completions",
                cast_to=object,
                body=_quiet({**body, "stream": True, "stream_options": {"include_usage": True}}),
                options=_OPTIONS,
                stream=True,
                stream_cls=openai.AsyncStream[object],
            )
            async with aclosing(_closed_with(events)) as read:
                async for event in read:
                    yield event
            return
        except openai.APIError as error:
            found = _ours(error)
        except Exception as error:  # noqa: BLE001 - no JSON, half an event; up to openai 2 the transport's own
            found = UpstreamError(f"the upstream's answer cannot be read: {type(error).__name__}", cause="broken")
        raise found

    def _client(self) -> openai.AsyncOpenAI:
        import openai

        timeout = openai.Timeout(self._timeout, connect=min(self._timeout, CONNECT_SECONDS))
        return openai.AsyncOpenAI(api_key=self._key(), base_url=self._url, timeout=timeout, max_retries=0)

    def _key(self) -> str:
        if self._file is not None:
            try:
                key = self._file.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeError) as error:
                raise ConfigurationError(f"cannot read the upstream's key: {type(error).__name__}") from None
        else:
            key = os.environ.get(self._variable or KEY_VARIABLE, "").strip()
        if not key and (self._file is not None or self._variable is not None):
            # Not what was written there, which may be the key itself.
            where = (
                "the file that api_key_file names" if self._file else "the environment variable that api_key_env names"
            )
            raise ConfigurationError(f"{where} holds no key for the upstream")
        return key or "none"


async def _closed_with(events: openai.AsyncStream[object]) -> AsyncGenerator[object, None]:
    """The events; whatever ends this closes the connection and the client's own generators."""
    try:
        async with events:
            async for event in events:
                yield event
    finally:
        with suppress(Exception):
            await anext(events, None)


class _Reading:
    """One answer's bodies or events, made sense of."""

    def __init__(self) -> None:
        self.reason: FinishReason | None = None
        self._characters = 0
        self._halves: dict[str, str] = {}

    def piece(self, data: Any) -> Piece | None:
        """What an event adds; None where it adds nothing that is read.

        Raises:
            UpstreamError: it has not the shape of an answer, or the answer is too long.
        """
        if not isinstance(data, Mapping) or (data.get("choices") is None and "usage" not in data):
            raise UpstreamError("the upstream's answer is no completion; check its URL", cause="broken")
        found = [one for one in map(_object, _list(data.get("choices"))) if one.get("index") in (0, None)]
        choice = found[0] if found else {}
        said = _object(choice.get("delta") or choice.get("message"))
        piece = Piece(
            text=self._joined("content", _text(said.get("content"))),
            refusal=self._joined("refusal", _text(said.get("refusal"))),
            thought=self._joined("thought", _thought(said)),
            calls=tuple(_call(at, call) for at, call in enumerate(_list(said.get("tool_calls")))),
            reason=self._ended(choice.get("finish_reason")),
            usage=_usage(data.get("usage")),
            thought_tokens=_thought_tokens(data.get("usage")),
        )
        self._characters += len(piece.text) + len(piece.refusal) + len(piece.thought)
        self._characters += sum(1 + len(call.id) + len(call.name) + len(call.arguments) for call in piece.calls)
        if self._characters > MOST_CHARACTERS:
            raise UpstreamError(f"the upstream's answer is longer than {MOST_CHARACTERS} characters", cause="broken")
        return None if piece == Piece() else piece

    def _joined(self, field: str, text: str) -> str:
        """Text of whole characters: servers that cut it by UTF-16 send a surrogate pair in two events."""
        text = self._halves.pop(field, "") + text
        if "\ud800" <= text[-1:] <= "\udbff":
            self._halves[field], text = text[-1], text[:-1]
        return valid_text(text)

    def _ended(self, reason: Any) -> FinishReason | None:
        if reason is None or reason == "":
            return None
        if not isinstance(reason, str) or reason not in _REASONS:
            raise UpstreamError("the upstream broke its answer off by itself", cause="broken")
        self.reason = _REASONS[reason]
        return self.reason


def _object(value: Any) -> Mapping[str, Any]:
    """An object; nothing is an empty one."""
    if value is not None and not isinstance(value, Mapping):
        raise UpstreamError("the upstream's answer has not the shape of one", cause="broken")
    return value or {}


def _list(value: Any) -> Sequence[Any]:
    """A list; nothing is an empty one."""
    if value is not None and not isinstance(value, list):
        raise UpstreamError("the upstream's answer has not the shape of one", cause="broken")
    return value or ()


def _text(content: Any) -> str:
    """Text, or the text of parts; other parts are not read."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, Sequence) else ()
    return "".join(
        str(part["text"])
        for part in parts
        if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )


def _thought(said: Mapping[str, Any]) -> str:
    """Servers have two names for it, and some say it under both."""
    found = (said.get(name) for name in ("reasoning_content", "reasoning"))
    return next((text for text in found if isinstance(text, str) and text), "")


def _call(at: int, call: Any) -> CallPiece:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise UpstreamError("the upstream's tool call is none", cause="broken")
    index, arguments = call.get("index"), function.get("arguments")
    return CallPiece(
        index if isinstance(index, int) else at,
        str(call.get("id") or ""),
        str(function.get("name") or ""),
        arguments if isinstance(arguments, str) else "" if arguments is None else json.dumps(arguments),
    )


def _usage(usage: Any) -> tuple[int, int] | None:
    if not isinstance(usage, Mapping):
        return None
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    prompt, completion = (count if isinstance(count, int) and count >= 0 else 0 for count in counts)
    return prompt, completion


def _thought_tokens(usage: Any) -> int | None:
    details = usage.get("completion_tokens_details") if isinstance(usage, Mapping) else None
    count = details.get("reasoning_tokens") if isinstance(details, Mapping) else None
    return count if isinstance(count, int) and count >= 0 else None


def _quiet(value: Any) -> Any:
    """A body whose texts the client's own log does not show."""
    if isinstance(value, str):
        return QuietText.of(value)
    if isinstance(value, Mapping):
        return {_quiet(name): _quiet(item) for name, item in value.items()}
    return [_quiet(item) for item in value] if isinstance(value, list) else value


def _kind(status: int) -> str:
    if status == 429:
        return "rate_limit"
    return "status" if status in (408, 409) or status >= 500 else "refused"


def _ours(error: openai.APIError) -> UpstreamError:
    """Our error for one of the client's; a server's message may quote the request and stays behind."""
    import openai

    if isinstance(error, openai.APIStatusError):
        status, code = error.status_code, error_code(error)
        cause = "refused" if code == "insufficient_quota" else _kind(status)
        wait = retry_after(error.response.headers, datetime.now(UTC))
        said = f"the upstream answered {status}" + (f" ({code})" if code else "")
        return UpstreamError(said, cause=cause, status=status, code=code, retry_after=wait)
    if isinstance(error, openai.APITimeoutError):
        return UpstreamError("the upstream did not answer in time", cause="timeout")
    if isinstance(error, openai.APIConnectionError):
        return UpstreamError("no usable connection to the upstream, or it broke", cause="connection")
    return UpstreamError("the upstream ended its stream with an error", cause="broken", code=error_code(error))
