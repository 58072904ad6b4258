"""What every request goes through: key, body, deadline, an eye on the client, errors, the log line."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractContextManager, AsyncExitStack, aclosing, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import anyio
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from tta_middleware.aio.streams import first_error
from tta_middleware.http_api import ApiError, read_body
from tta_middleware.server.api_errors import api_error, stopping, too_late
from tta_middleware.server.draining import Drain
from tta_middleware.server.keys import Caller, KeySource
from tta_middleware.server.request_log import REQUEST_ID, Record, new_id
from tta_middleware.server.settings import Limits
from tta_middleware.types import valid_text

CANCELLED = "cancelled"

GRACE_SECONDS = 1.0
"""How long a stream's last words wait for a client that does not read."""


@dataclass(eq=False, slots=True)
class Call:
    """One request, let in.

    Attributes:
        deadline: by the event loop's clock.
        caller: who sends it, and what that may.
        held: what is given back when the response has left.
    """

    request: Request
    body: bytes
    deadline: float
    limits: Limits
    record: Record
    drain: Drain
    caller: Caller = field(default_factory=Caller)
    held: AsyncExitStack = field(default_factory=AsyncExitStack)

    def late(self) -> ApiError:
        """Why it ends before its answer is over."""
        return stopping() if self.drain.over else too_late(self.limits.seconds)

    @property
    def most_tokens(self) -> int | None:
        """What the server and the key allow to ask for."""
        limits = (self.limits.max_tokens, self.caller.rights.max_tokens)
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def most_choices(self) -> int:
        """Answers that one request may ask for: each takes a place, of the server and of the key."""
        most, concurrency = min(self.limits.choices, self.limits.concurrency), self.caller.rights.concurrency
        return most if concurrency is None else min(most, concurrency)


Endpoint: TypeAlias = Callable[[Call], Awaitable["Response | EventStream"]]

Told: TypeAlias = Callable[[Request, Record], AbstractContextManager[None]]


def _untold(_request: Request, _record: Record) -> AbstractContextManager[None]:
    return nullcontext()


class Front:
    """An endpoint behind the checks that all have in common; an ASGI application.

    Args:
        keys: who may come in.
        drain: what the end of the server leaves of a request's time.
        told: what stands around each request to tell of it; nobody is told by default.
    """

    def __init__(
        self, endpoint: Endpoint, keys: KeySource, limits: Limits, drain: Drain, told: Told | None = None
    ) -> None:
        self._endpoint, self._keys, self._limits, self._drain = endpoint, keys, limits, drain
        self._told = told or _untold

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        record = Record(new_id(), scope["method"], scope["path"])
        with self._told(request, record):
            await self._answer(request, _Outgoing(send, record), record)

    async def _answer(self, request: Request, out: _Outgoing, record: Record) -> None:
        try:
            await self._attend(request, out, record)
        except Exception as error:  # noqa: BLE001 - the one place that turns every error into an answer
            answer = api_error(error)
            record.failed(error, answer.status)
            if record.status is None:
                await error_response(answer)(request.scope, request.receive, out)
        except BaseException:
            record.error = record.error or CANCELLED  # the server stops before the answer is over
            raise
        finally:
            record.write()

    async def _attend(self, request: Request, out: _Outgoing, record: Record) -> None:
        caller = self._keys.get().caller(request.headers)
        record.key = caller.name
        deadline = anyio.current_time() + self._limits.seconds
        body = b""
        with self._drain.by(deadline) as reading:
            body = await read_body(request, self._limits.body_bytes)
        if reading.cancelled_caught:
            raise ApiError(408, "the body did not arrive in time", code="timeout")
        call = Call(request, body, deadline, self._limits, record, self._drain, caller)
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(_watch, request, out, group.cancel_scope)
                await self._respond(call, out)
                group.cancel_scope.cancel()
        except BaseExceptionGroup as errors:
            raise first_error(errors) from None

    async def _respond(self, call: Call, out: _Outgoing) -> None:
        async with call.held:
            response: Response | EventStream | None = None
            with call.drain.by(call.deadline):
                response = await self._endpoint(call)
            if response is None:
                raise call.late()
            await response(call.request.scope, call.request.receive, out)


class _Outgoing:
    """What leaves, with the request's id; notes the status.

    Attributes:
        over: all of it has left.
    """

    def __init__(self, send: Send, record: Record) -> None:
        self._send, self.record, self.over = send, record, False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.record.status = message["status"]
            message = {**message, "headers": [*message["headers"], (REQUEST_ID.encode(), self.record.id.encode())]}
        # Before it is sent: servers say of a client whose response is over that it has gone, too.
        self.over = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)


async def _watch(request: Request, out: _Outgoing, work: anyio.CancelScope) -> None:
    """Cancels the work on a request whose client has gone; the body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    if not out.over:
        out.record.disconnected = True
    work.cancel()


@dataclass(frozen=True, slots=True)
class EventForm:
    """How events look on the wire.

    Attributes:
        event: one event.
        end: what follows the last one.
        error: the event for an error, after so many others.
    """

    event: Callable[[Mapping[str, Any]], bytes]
    end: bytes
    error: Callable[[ApiError, int], bytes]


class EventStream:
    """A response of server-sent events.

    An error after its start is its last event, without an end: what came before is no whole answer.

    Args:
        events: payloads; whatever happens they are closed.
        form: None is that of chat completions.
    """

    def __init__(
        self,
        call: Call,
        events: AsyncGenerator[Mapping[str, Any], None],
        headers: Mapping[str, str],
        form: EventForm | None = None,
    ) -> None:
        self._call, self._events, self._headers, self._form = call, events, headers, form or PLAIN_EVENTS
        self._sent = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store", **self._headers}
        encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        broken: list[Exception] = []
        async with aclosing(self._events) as events:
            await send({"type": "http.response.start", "status": 200, "headers": encoded})
            with self._call.drain.by(self._call.deadline):
                try:
                    async for event in events:
                        await send(_part(self._form.event(event)))
                        self._sent += 1
                    await send(_part(self._form.end, more=False))
                    return
                except Exception as raised:  # noqa: BLE001 - said in the stream, since its status has left
                    broken.append(raised)
        await self._end_with(broken[0] if broken else self._call.late(), send)

    async def _end_with(self, error: Exception, send: Send) -> None:
        answer = api_error(error)
        self._call.record.failed(error, answer.status)
        with anyio.move_on_after(GRACE_SECONDS):
            await send(_part(self._form.error(answer, self._sent), more=False))


def json_response(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """As JSON; halves of surrogate pairs, which a request may hold in a name, are replaced."""
    return Response(_json(content), status, dict(headers or {}), "application/json")


def error_response(error: ApiError) -> Response:
    """An error in OpenAI's shape."""
    return json_response(error.body, error.status, error.headers)


def _part(body: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


def _event(content: object) -> bytes:
    return b"data: " + _json(content) + b"\n\n"


def _named(event: Mapping[str, Any]) -> bytes:
    return f"event: {event['type']}\n".encode() + _event(event)


def _named_error(error: ApiError, sent: int) -> bytes:
    told = {name: error.body["error"][name] for name in ("code", "message", "param")}
    return _named(told | {"type": "error", "sequence_number": sent})


def _json(content: object) -> bytes:
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return valid_text(text).encode()


PLAIN_EVENTS = EventForm(_event, b"data: [DONE]\n\n", lambda error, _: b"event: error\n" + _event(error.body))
"""Those of chat completions."""

NAMED_EVENTS = EventForm(_named, b"", _named_error)
"""Those of the Responses API."""
