"""A server of OpenAI's protocol that says what a test tells it to, byte by byte, and breaks off where it is told to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from staged_server import CALM

from tta_middleware.config import Windows
from tta_middleware.moderation.retry import RetryPolicy
from tta_middleware.server.upstream import UpstreamModel, UpstreamSettings
from tta_middleware.testing.delays import Unequal, slow_even
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging


def delta(**said: Any) -> dict[str, Any]:
    """An event of a stream."""
    reason = said.pop("finish_reason", None)
    return {"id": "c", "object": "chat.completion.chunk", "choices": [choice(said, reason)]}


def choice(said: dict[str, Any], reason: str | None, index: int = 0) -> dict[str, Any]:
    return {"index": index, "delta": said, "finish_reason": reason}


USAGE = {"prompt_tokens": 7, "completion_tokens": 11, "total_tokens": 18}


def words(text: str) -> list[dict[str, Any]]:
    """A text as events, a word each."""
    return [delta(content=word) for word in text.replace(" ", " \0").split("\0")]


def told(text: str, **end: Any) -> list[Any]:
    """A whole stream."""
    reason = end.get("finish_reason", "stop")
    return [delta(role="assistant"), *words(text), delta(finish_reason=reason), {"choices": [], "usage": USAGE}]


def completion(text: str | None = CALM, reason: str = "stop", **more: Any) -> dict[str, Any]:
    """An answer that is not streamed."""
    message = {"role": "assistant", "content": text, **more}
    return {"object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": reason}]} | {
        "usage": USAGE
    }


@dataclass
class Wire:
    """One request, and the line to whoever sent it."""

    body: dict[str, Any]
    headers: dict[str, str]
    handler: BaseHTTPRequestHandler

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        length = {"content-type": "application/json", "content-length": str(len(data))}
        self._head(status, {**length, **headers})
        self.handler.wfile.write(data)

    def stream(self, events: list[Any], *, done: bool = True) -> None:
        """Events as server-sent events; bytes go out as they are. Without an end the connection breaks."""
        self._head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"})
        for event in events:
            self.send(event if isinstance(event, bytes) else b"data: " + json.dumps(event).encode() + b"\n\n")
        if done:
            self.send(b"data: [DONE]\n\n")
            self.handler.wfile.write(b"0\r\n\r\n")

    def send(self, data: bytes) -> None:
        self.handler.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.handler.wfile.flush()

    def until_left(self) -> None:
        """Until the other side closes the connection."""
        self.handler.connection.settimeout(30)
        assert self.handler.connection.recv(1) == b""

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.handler.send_response(status)
        # Said, since it is closed after every answer: a client would send its next request into the end of it.
        for name, value in {"connection": "close", **headers}.items():
            self.handler.send_header(name, value)
        self.handler.end_headers()


Plan = Callable[[Wire], None]


def saying(text: str = CALM) -> Plan:
    """Says ``text``, streamed where that is asked for."""
    return lambda wire: wire.stream(told(text)) if wire.body.get("stream") else wire.answer(completion(text))


@dataclass
class Upstream:
    """A staged upstream that runs."""

    url: str
    plan: Plan
    requests: list[Wire] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)

    def model(self, **settings: Any) -> UpstreamModel:
        """This upstream behind a guard."""
        stand_in = settings.pop("stand_in", None)
        given = {
            "moderator": Unequal(ScriptedModerator(score=flagging("forbidden")), slow_even),
            "windows": Windows(first=24, largest=48),
            "retry": RetryPolicy(attempts=3, base_delay=0.0, max_delay=0.0, max_retry_after=0.0),
            **settings,
        }
        return UpstreamModel(UpstreamSettings(upstream=self.url, **given), stand_in=stand_in)


@contextmanager
def upstream(plan: Plan | None = None) -> Iterator[Upstream]:
    """A staged upstream; ``plan`` answers each request."""
    found = Upstream("", plan or saying())

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            wire = Wire(body, {name.lower(): value for name, value in self.headers.items()}, self)
            found.requests.append(wire)
            self.close_connection = True
            try:
                found.plan(wire)
            except OSError:
                found.left.set()

        def log_message(self, *args: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
        thread.join(30)
