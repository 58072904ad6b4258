"""Bad input byte by byte, over real sockets: an error in OpenAI's shape, and the server goes on."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from typing import Any

import httpx
import pytest
from staged_server import CALM, Served, running, scripted

from tta_middleware.errors import ConfigurationError
from tta_middleware.testing.scripted_engine import ScriptedEngine

USER: Any = {"role": "user", "content": "Roses?"}
IMAGE: Any = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}
TOOL: Any = {"type": "function", "function": {"name": "water"}}


class Toolless(ScriptedEngine):
    async def tool_format(self) -> Any:
        raise ConfigurationError("this model takes no tools")


@pytest.fixture(scope="module")
def server() -> Any:
    with running({"roses": scripted(), "toolless": scripted(engine=Toolless(CALM))}) as one:
        yield one


def post(body: bytes, *headers: bytes, length: int | None = None, path: bytes = b"/v1/chat/completions") -> bytes:
    size = b"content-length: %d" % (len(body) if length is None else length)
    lines = [b"POST %b HTTP/1.1" % path, b"host: here", b"connection: close", size, *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def chat(**changed: Any) -> bytes:
    return post(json.dumps({"model": "roses", "messages": [USER]} | changed).encode())


def response(**changed: Any) -> bytes:
    body = json.dumps({"model": "roses", "input": "Roses?"} | changed).encode()
    return post(body, path=b"/v1/responses")


SENT: dict[str, tuple[bytes, int | None, str]] = {
    "broken JSON": (post(b'{"model": "roses", "messages": ['), 400, "JSON"),
    "no JSON": (post(b"\xff\xfe\x00"), 400, "JSON"),
    "an empty body": (post(b""), 400, "JSON"),
    "an unknown model": (chat(model="tulips"), 404, "not served here"),
    "an unknown field": (chat(mood="x"), 400, "mood"),
    "a field that would weaken the guard": (chat(logprobs=True), 400, "withheld"),
    "a wrong role": (chat(messages=[{"role": "wizard", "content": "x"}]), 400, "role"),
    "no messages": (chat(messages=[]), 400, "at least 1"),
    "an empty message": (chat(messages=[{"role": "user", "content": ""}]), 400, "user"),
    "an image": (chat(messages=[IMAGE]), 400, "image_url"),
    "tools that the model cannot call": (chat(model="toolless", tools=[TOOL]), 400, "takes no tools"),
    "a body of 10 MB": (chat(messages=[{"role": "user", "content": "x" * 10_000_000}]), 413, "larger than"),
    "a body that says it has 10 MB": (post(b"{", length=10_000_000), 413, "larger than"),
    "a length that is none": (post(b"{}", length=-1), 400, ""),
    "10,000 messages": (chat(messages=[USER] * 10_000), 200, CALM[:20]),
    "half a request": (post(b'{"model": "ro', length=100), None, ""),
    "a flood of headers": (post(b"{}", *(b"h%d: %s" % (n, b"x" * 900) for n in range(200))), None, ""),
    "no HTTP": (b"\x16\x03\x01\x02\x00 hello\r\n\r\n", 400, ""),
    "a response of broken JSON": (post(b"{", path=b"/v1/responses"), 400, "JSON"),
    "a response with an image": (response(input=[IMAGE]), 400, "image_url"),
    "a response of 10,000 messages": (response(input=[USER] * 10_000), 200, CALM[:20]),
    "a response of an unknown model": (response(model="tulips"), 404, "not served here"),
}


SLOW = ("10,000 messages", "a response of 10,000 messages")
"""The scripted model takes seconds to make rows of so many words."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in SENT])
def test_it_is_refused_and_the_server_goes_on(server: Served, name: str) -> None:
    sent, status, words = SENT[name]
    received = exchange(server, sent, whole=status is not None)
    found = re.match(rb"HTTP/1.1 (\d+)", received)
    if status is not None:
        assert found is not None, received[:200]
        assert int(found[1]) == status
    elif found is not None:
        assert 400 <= int(found[1]) < 500
    assert words.encode() in received
    if status not in (None, 200) and words:
        error = json.loads(received.partition(b"\r\n\r\n")[2])["error"]
        assert set(error) == {"message", "type", "param", "code"}
    body = {"model": "roses", "messages": [USER]}
    assert httpx.post(f"{server.url}/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"] == CALM


def exchange(server: Served, sent: bytes, *, whole: bool) -> bytes:
    """What comes back; a client that is not ``whole`` has gone by then."""
    received = b""
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    with socket.create_connection(address, timeout=30) as connection, contextlib.suppress(ConnectionError):
        # A server that answers before it has read all of a body closes the connection under whoever goes on sending.
        with contextlib.suppress(OSError):
            connection.sendall(sent)
            if not whole:
                connection.shutdown(socket.SHUT_WR)
        while not _complete(received) and (data := connection.recv(65_536)):
            received += data
    return received


def _complete(received: bytes) -> bool:
    head, _, body = received.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    return length is not None and len(body) >= int(length[1])
