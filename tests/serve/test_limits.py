"""Keys, places, deadlines, clients that leave or do not read, and the end of the server."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import httpx
import openai
import pytest
from staged_server import CALM, Log, Served, running, scripted

from tta_middleware.errors import ConfigurationError
from tta_middleware.server import ServerSettings, create_app
from tta_middleware.server.keys import Keys
from tta_middleware.testing.delays import turns
from tta_middleware.testing.scripted_engine import ScriptedEngine

ROSES: Any = [{"role": "user", "content": "Roses?"}]


class Held:
    """A scripted engine's ``sleep`` that waits at one step until it is let go.

    Attributes:
        reached: the step was reached.
        cancelled: whoever waited there was cancelled.
    """

    def __init__(self, at: int) -> None:
        self.reached, self.cancelled, self.go = threading.Event(), threading.Event(), threading.Event()
        self._at, self._steps = at, 0

    async def sleep(self, _: float) -> None:
        self._steps += 1
        if self._steps != self._at:
            return
        self.reached.set()
        try:
            await anyio.to_thread.run_sync(self.go.wait, abandon_on_cancel=True)
        except BaseException:
            self.cancelled.set()
            self.go.set()  # for the thread that is left behind
            raise


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
    keys = Keys.read(file)
    assert list(keys.digests) == ["alice", "key2"]
    assert "sk-one" not in repr(keys)
    for text in ("# none\n", "one two three\n", "a x\na y\n"):
        file.write_text(text)
        with pytest.raises(ConfigurationError):
            Keys.read(file)
    with pytest.raises(ConfigurationError, match="cannot read"):
        Keys.read(tmp_path / "missing")


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


def test_a_deadline_before_any_text() -> None:
    held = Held(at=2)
    model = scripted(engine=ScriptedEngine(CALM, sleep=held.sleep))
    with running(model, limits={"seconds": 0.3}) as served:
        for stream in (True, False):
            held.__init__(at=2)  # type: ignore[misc]
            answer = httpx.post(f"{served.url}/v1/chat/completions", json=body(stream=stream))
            assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
            assert held.cancelled.wait(30)


def test_a_deadline_in_mid_stream(log: Log) -> None:
    held = Held(at=16)
    model = scripted(engine=ScriptedEngine(CALM, sleep=held.sleep))
    with running(model, limits={"seconds": 1.0}) as served:
        answer = httpx.post(f"{served.url}/v1/chat/completions", json=body(stream=True))
    assert answer.status_code == 200
    assert "Water" in answer.text
    assert answer.text.rstrip().rpartition("\n\n")[2].startswith("event: error\ndata: ")
    assert "deadline_exceeded" in answer.text
    assert "[DONE]" not in answer.text
    assert held.cancelled.wait(30)


def leave_early(served: Served) -> None:
    """Closes a stream after its first text."""
    with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=body(stream=True)) as answer:
        next(line for line in answer.iter_lines() if "Water" in line)


def give_up(served: Served) -> None:
    """Closes the connection while a whole answer is waited for."""
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served.url}/v1/chat/completions", json=body(), timeout=0.5)


@pytest.mark.parametrize("leave", [leave_early, give_up])
def test_a_client_that_leaves_stops_the_decoding(leave: Callable[[Served], None], log: Log) -> None:
    held = Held(at=16)
    engine = ScriptedEngine(CALM, sleep=held.sleep)
    with running(scripted(engine=engine), limits={"concurrency": 1, "queue": 0}) as served:
        leave(served)
        assert held.cancelled.wait(30), "the step that was under way goes on"
        assert log.request(disconnected=True)
        assert engine.steps == 15
        after = httpx.post(f"{served.url}/v1/chat/completions", json=body())
    assert after.status_code == 200


def chat_scope() -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/chat/completions",
        "raw_path": b"/v1/chat/completions",
        "query_string": b"",
        "root_path": "",
        "headers": [],
    }


async def test_a_slow_reader_holds_the_decoding_back() -> None:
    words = " ".join(f"rose{number}" + "x" * 200 for number in range(400))
    engine = ScriptedEngine(words)
    app = create_app({"roses": scripted(engine=engine, max_new_tokens=500)}, ServerSettings())
    sent: list[bytes] = []
    reads = anyio.Event()
    asked = False

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request", "body": json.dumps(body(stream=True)).encode()}
        await anyio.sleep_forever()
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))
        if len(sent) == 5:
            await reads.wait()

    async with anyio.create_task_group() as group:
        group.start_soon(app, chat_scope(), receive, send)
        await turns(5000)
        while_waiting = engine.steps
        await turns(5000)
        assert engine.steps == while_waiting < 100
        reads.set()
    assert engine.steps > 390
    assert sent[-1] == b"data: [DONE]\n\n"


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
