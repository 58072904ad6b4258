"""Keys, places, deadlines, clients that leave or do not read, and the end of the server."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import httpx
import openai
import pytest
from staged_server import CALM, CHAT_SCOPE, Held, Log, Reader, Served, running, scripted

from tta_middleware.errors import ConfigurationError
from tta_middleware.server import ServerSettings, create_app
from tta_middleware.server.keys import KeyFile, Keys
from tta_middleware.testing.delays import turns
from tta_middleware.testing.scripted_engine import ScriptedEngine
from tta_middleware.testing.virtual_time import run_in_virtual_time

ROSES: Any = [{"role": "user", "content": "Roses?"}]


def body(**more: Any) -> dict[str, Any]:
    return {"model": "roses", "messages": ROSES, **more}


def test_keys_are_asked_for_and_known_by_name(log: Log) -> None:
    digest = hashlib.sha256(b"sk-two").hexdigest()
    with running(keys=f"alice sk-one, bob sha256:{digest}  # a comment") as served:
        for key in ("sk-one", "sk-two"):
            with served.client(key) as api:
                assert api.models.list().data[0].id == "roses"
        for key in ("sk-three", f"sha256:{digest}"):
            with served.client(key) as api, pytest.raises(openai.AuthenticationError) as raised:
                api.chat.completions.create(model="roses", messages=ROSES)
            assert raised.value.code == "invalid_api_key"
        statuses = [
            httpx.request(method, f"{served.url}{path}").status_code
            for method, path in (
                ("POST", "/v1/chat/completions"),
                ("POST", "/v1/moderations"),
                ("POST", "/v1/checks"),
                ("GET", "/v1/models"),
                ("GET", "/health"),
                ("GET", "/ready"),
            )
        ]
        odd = httpx.get(f"{served.url}/v1/models", headers={"Authorization": b"Basic \xff\xfe"})
    assert statuses == [401, 401, 401, 401, 200, 200]
    assert odd.status_code == 401
    assert log.request(path="/v1/models", key="bob")
    assert "sk-" not in "".join(log.lines)


def test_keys_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nalice sk-one\n\nsk-two\n")
    keys = KeyFile(file).get()
    assert list(keys.digests) == ["alice", "key2"]
    assert "sk-one" not in repr(keys)
    for text in ("# none\n", "one two three\n", "a x\na y\n", "a x policy=b policy=c\n", "a x concurrency=0\n"):
        file.write_text(text)
        with pytest.raises(ConfigurationError):
            KeyFile(file)
    with pytest.raises(ConfigurationError, match="cannot read"):
        KeyFile(tmp_path / "missing")


@pytest.mark.parametrize("line", ["alice sk-one secret", "alice sk-one c2VjcmV0==", "alice sk-one concurrency=secret"])
def test_a_key_with_a_blank_in_it_is_not_shown(tmp_path: Path, line: str, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_text("alice sk-one\n")
    keys = KeyFile(file)
    file.write_text(f"{line}\n")
    assert list(keys.get().digests) == ["alice"]
    with pytest.raises(ConfigurationError) as found:
        KeyFile(file)
    assert "API key 1" in str(found.value)
    assert "API key 1" in caplog.text
    assert not any(word in f"{found.value} {caplog.text}" for word in ("sk-one", "secret", "c2VjcmV0"))


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TTA_API_KEYS", raising=False)
    assert Keys.of_environment().digests == {}
    monkeypatch.setenv("TTA_API_KEYS", "sk-one,bob sk-zw\u00f6lf")
    keys = Keys.of_environment()
    assert keys.caller({"authorization": "Bearer sk-zw\u00f6lf".encode().decode("latin-1")}).name == "bob"
    monkeypatch.setenv("TTA_API_KEYS", " ")
    with pytest.raises(ConfigurationError, match="holds no API key"):
        Keys.of_environment()


def test_beyond_places_and_queue_a_client_is_asked_to_come_again() -> None:
    held = Held(at=3)
    model = scripted(engine=ScriptedEngine(CALM, sleep=held.sleep))
    answers: list[Any] = []

    def ask(served: Served) -> None:
        answers.append(httpx.post(f"{served.url}/v1/chat/completions", json=body(), timeout=60))

    with running(model, limits={"concurrency": 1, "queue": 0, "retry_after": 7}) as served:
        first = threading.Thread(target=ask, args=[served])
        first.start()
        assert held.reached.wait(30)
        busy = httpx.post(f"{served.url}/v1/chat/completions", json=body())
        check = httpx.post(f"{served.url}/v1/checks", json={"text": "hello"})
        held.go.set()
        first.join(30)
        again = httpx.post(f"{served.url}/v1/chat/completions", json=body())
    assert (busy.status_code, busy.headers["retry-after"]) == (429, "7")
    assert busy.json()["error"]["type"] == "rate_limit_error"
    assert (check.status_code, answers[0].status_code, again.status_code) == (200, 200, 200)


def test_the_queue_is_served_in_turn() -> None:
    held = Held(at=3)
    model = scripted(engine=ScriptedEngine(CALM, sleep=held.sleep))
    statuses: list[int] = []

    def ask(served: Served) -> None:
        statuses.append(httpx.post(f"{served.url}/v1/chat/completions", json=body(), timeout=60).status_code)

    with running(model, limits={"concurrency": 1, "queue": 5}) as served:
        clients = [threading.Thread(target=ask, args=[served]) for _ in range(6)]
        for client in clients:
            client.start()
        assert held.reached.wait(30)
        held.go.set()
        for client in clients:
            client.join(30)
    assert statuses == [200] * 6


def leave_early(served: Served, _: Held) -> None:
    """Closes a stream after its first text."""
    with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=body(stream=True)) as answer:
        next(line for line in answer.iter_lines() if "Water" in line)


def give_up(served: Served, held: Held) -> None:
    """Closes the connection while a whole answer is waited for."""
    content = json.dumps(body()).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: here\r\nContent-Length: {len(content)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as connection:
        connection.sendall(head.encode() + content)
        assert held.reached.wait(30)


@pytest.mark.parametrize("leave", [leave_early, give_up])
def test_a_client_that_leaves_stops_the_decoding(leave: Callable[[Served, Held], None], log: Log) -> None:
    held = Held(at=16)
    engine = ScriptedEngine(CALM, sleep=held.sleep)
    with running(scripted(engine=engine), limits={"concurrency": 1, "queue": 0}) as served:
        leave(served, held)
        assert held.cancelled.wait(30), "the step that was under way goes on"
        assert log.request(disconnected=True)
        assert engine.steps == 15
        after = httpx.post(f"{served.url}/v1/chat/completions", json=body())
        assert "disconnected" not in log.request(finish_reason="stop")
    assert after.status_code == 200


def long_answer() -> ScriptedEngine:
    return ScriptedEngine(" ".join(f"rose{number}" + "x" * 200 for number in range(400)))


async def test_a_slow_reader_holds_the_decoding_back() -> None:
    engine, reader = long_answer(), Reader(pieces=4)
    app = create_app({"roses": scripted(engine=engine, max_new_tokens=500)}, ServerSettings())
    async with anyio.create_task_group() as group:
        group.start_soon(app, CHAT_SCOPE, reader.receive, reader.send)
        await turns(5000)
        while_waiting = engine.steps
        await turns(5000)
        assert engine.steps == while_waiting < 100
        reader.reads.set()
    assert engine.steps > 390
    assert reader.sent[-1] == b"data: [DONE]\n\n"


@pytest.mark.parametrize("pieces", [0, 1, 4])
async def test_a_reader_that_leaves_while_it_does_not_read(pieces: int) -> None:
    engine, reader = long_answer(), Reader(pieces)
    app = create_app({"roses": scripted(engine=engine, max_new_tokens=500)}, ServerSettings())
    async with anyio.create_task_group() as group:
        group.start_soon(app, CHAT_SCOPE, reader.receive, reader.send)
        await turns(5000)
        reader.leaves.set()
    stopped = engine.steps
    await turns(500)
    assert engine.steps == stopped < 100
    assert len(asyncio.all_tasks()) == 1


def timed(engine: ScriptedEngine, reader: Callable[[], Reader], seconds: float) -> tuple[Reader, float]:
    """The answer to one request, and when it was over, on a clock that jumps."""

    async def ask() -> tuple[Reader, float]:
        app, one = create_app({"roses": scripted(engine=engine)}, ServerSettings(limits={"seconds": seconds})), reader()
        await app(CHAT_SCOPE, one.receive, one.send)
        return one, anyio.current_time()

    return run_in_virtual_time(ask())


@pytest.mark.parametrize("stream", [True, False])
def test_a_deadline_before_any_text(stream: bool) -> None:
    engine = ScriptedEngine(CALM, step_seconds=20.0)
    reader, ended = timed(engine, lambda: Reader(stream=stream), seconds=30.0)
    assert (reader.status, ended, engine.steps) == (504, 30.0, 1)
    assert json.loads(b"".join(reader.sent))["error"]["code"] == "deadline_exceeded"


def test_a_deadline_in_mid_stream(log: Log) -> None:
    engine = ScriptedEngine(CALM, step_seconds=2.0)
    reader, ended = timed(engine, Reader, seconds=31.0)
    text = b"".join(reader.sent).decode()
    assert (reader.status, ended, engine.steps) == (200, 31.0, 15)
    assert "Water" in text
    assert text.rstrip().rpartition("\n\n")[2].startswith("event: error\ndata: ")
    assert "deadline_exceeded" in text
    assert "[DONE]" not in text
    assert log.request(status=200)["error"] == "ApiError"


def test_a_deadline_in_the_queue() -> None:
    async def ask() -> list[int | None]:
        app = create_app(
            {"roses": scripted(engine=ScriptedEngine(CALM, step_seconds=2.0))},
            ServerSettings(limits={"seconds": 60.0, "concurrency": 1}),
        )
        readers = [Reader(stream=False) for _ in range(3)]
        async with anyio.create_task_group() as group:
            for one in readers:
                group.start_soon(app, CHAT_SCOPE, one.receive, one.send)
        return [one.status for one in readers]

    assert run_in_virtual_time(ask()) == [200, 504, 504]


def test_a_reader_that_never_reads_meets_its_deadline() -> None:
    engine = long_answer()
    reader, ended = timed(engine, lambda: Reader(pieces=4), seconds=100.0)
    assert engine.steps < 100
    assert ended == 101.0  # a second for the last words
    assert not any(b"[DONE]" in piece for piece in reader.sent)


def test_a_server_that_is_told_to_stop_ends_what_is_under_way() -> None:
    held = Held(at=16)
    model = scripted(engine=ScriptedEngine(CALM, sleep=held.sleep))
    with (
        running(model) as served,
        httpx.stream("POST", f"{served.url}/v1/chat/completions", json=body(stream=True)) as answer,
    ):
        lines = answer.iter_lines()
        next(line for line in lines if "Water" in line)
        served.server.should_exit = True
        held.go.set()
        rest = list(lines)
    assert [line for line in rest if line][-1] == "data: [DONE]"
