"""A loopback HTTP server that answers like a moderation API and misbehaves on demand."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeAlias

from tta_middleware.testing.faults import Fault, Plan, always
from tta_middleware.types import CATEGORIES

Scorer: TypeAlias = Callable[[str], Mapping[str, float]]
Route: TypeAlias = Callable[[Any], Any]


def marked_scores(text: str) -> dict[str, float]:
    """0.9 for violence where the text holds the mark ``flagme``, else 0.001 everywhere."""
    return dict.fromkeys(CATEGORIES, 0.001) | ({"violence": 0.9} if "flagme" in text else {})


def moderations(score: Scorer = marked_scores) -> Route:
    """The OpenAI API's answer to a request body, with the scores of ``score``."""

    def answer(body: Any) -> dict[str, Any]:
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        results = []
        for text in texts:
            scores = dict(score(text))
            flags = {name: value >= 0.5 for name, value in scores.items()}
            results.append({"flagged": any(flags.values()), "categories": flags, "category_scores": scores})
        return {"id": "modr-loopback", "model": body.get("model", "loopback"), "results": results}

    return answer


@dataclass(frozen=True, slots=True)
class ReceivedRequest:
    """What the server was sent."""

    path: str
    headers: Mapping[str, str]
    body: Any

    @property
    def texts(self) -> list[str]:
        """The texts of a ``/moderations`` request."""
        value = self.body["input"]
        return [value] if isinstance(value, str) else list(value)


@dataclass(eq=False)
class FaultServer:
    """Serves on 127.0.0.1 inside ``async with`` (the caller's loop) or ``with`` (a thread with its own loop).

    Attributes:
        plan: the fault of each request; may be replaced while the server runs.
        routes: answers by path without the query; ``/v1/moderations`` is there unless given.
        requests: what arrived, in order.
        connections: sockets that are open now.
    """

    plan: Plan = field(default_factory=always)
    routes: Mapping[str, Route] = field(default_factory=dict)
    requests: list[ReceivedRequest] = field(default_factory=list)
    connections: int = 0
    port: int = 0

    def __post_init__(self) -> None:
        self.routes = {"/v1/moderations": moderations(), **self.routes}
        self._handlers: set[asyncio.Task[None]] = set()
        self._thread: _ServerThread | None = None

    @property
    def url(self) -> str:
        """The server's root, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def base_url(self) -> str:
        """The ``base_url`` of an OpenAI client."""
        return f"{self.url}/v1"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, backlog=2048)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.close()
        for handler in self._handlers:
            handler.cancel()
        await asyncio.gather(*self._handlers, return_exceptions=True)
        await self._server.wait_closed()

    def __enter__(self) -> Self:
        self._thread = _ServerThread(self)
        self._thread.open()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread.close()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A plain function: asyncio's streams log an error for each connection task that is cancelled.
        handler = asyncio.create_task(self._connected(reader, writer))
        self._handlers.add(handler)
        handler.add_done_callback(self._handlers.discard)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            await self._converse(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.connections -= 1
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while not writer.is_closing():
            request = await _read(reader)
            fault = self.plan(len(self.requests))
            self.requests.append(request)
            await asyncio.sleep(fault.latency)
            await self._answer(request, fault, reader, writer)

    async def _answer(
        self, request: ReceivedRequest, fault: Fault, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if fault.kind == "hang":
            await reader.read()
            writer.close()
            return
        status, content_type, body = self._content(request, fault)
        writer.write(_head(status, content_type, len(body), fault.headers))
        if fault.kind == "reset":
            writer.write(body[: len(body) // 2])
            await writer.drain()
            _reset(writer)
        elif fault.kind == "drip":
            await _drip(writer, body, fault.drip)
        else:
            writer.write(body)
            await writer.drain()

    def _content(self, request: ReceivedRequest, fault: Fault) -> tuple[int, str, bytes]:
        route = self.routes.get(request.path)
        if route is None:
            return 404, "application/json", b'{"error": {"message": "no such path", "code": "not_found"}}'
        if fault.kind == "status":
            error = {"message": "staged", "type": "staged", "code": f"staged_{fault.status}"}
            return fault.status, "application/json", json.dumps({"error": error}).encode()
        if fault.kind == "html":
            return 200, "text/html", b"<html><body>Bad gateway</body></html>"
        payload = _spoil(route(request.body), fault)
        body = json.dumps(payload).encode()
        return 200, "application/json", body[:-20] if fault.kind == "truncated" else body


def _spoil(payload: Any, fault: Fault) -> Any:
    """Unusable scores in a well-formed answer."""
    if fault.kind == "wrong_length":
        payload["results"] = payload["results"][:-1]
    elif fault.kind == "nan":
        payload["results"][-1]["category_scores"]["violence"] = float("nan")
    elif fault.kind == "missing_category":
        del payload["results"][-1]["category_scores"]["violence"]
    return payload


async def _read(reader: asyncio.StreamReader) -> ReceivedRequest:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {}
    for line in filter(None, head[1:]):
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return ReceivedRequest(head[0].split()[1].partition("?")[0], headers, json.loads(body) if body else None)


def _head(status: int, content_type: str, length: int, headers: tuple[tuple[str, str], ...]) -> bytes:
    lines = [f"HTTP/1.1 {status} Staged", f"Content-Type: {content_type}", f"Content-Length: {length}"]
    lines += [f"{name}: {value}" for name, value in headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST instead of FIN, as a crashed peer does."""
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def _drip(writer: asyncio.StreamWriter, body: bytes, pause: float) -> None:
    for byte in body:
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(pause)


class _ServerThread:
    """Runs a server on a loop of its own."""

    def __init__(self, server: FaultServer) -> None:
        self._server = server
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="fault-server")

    def open(self) -> None:
        self._thread.start()
        self._ready.wait()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        async with self._server:
            self._ready.set()
            await self._stop.wait()
