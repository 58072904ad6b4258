"""How answers end that somebody or something ends: a server that stops, a client that leaves, a policy that is gone."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import anyio
import httpx
import openai
import pytest
from pydantic import BaseModel
from staged_server import CALM, CHAT_SCOPE, NOTICE, Held, Log, Reader, running, scripted, story
from starlette.applications import Starlette
from starlette.routing import Mount

from tta_middleware import TTAChatModel
from tta_middleware.errors import ConfigurationError
from tta_middleware.methods import Noise
from tta_middleware.policy.file import PolicyFile
from tta_middleware.server import ServerSettings, create_app
from tta_middleware.server.models import ServedModels
from tta_middleware.testing.delays import turns
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine
from tta_middleware.testing.virtual_time import run_in_virtual_time

ROSES: Any = [{"role": "user", "content": "Roses?"}]


def body(text: str = "Roses?", **more: Any) -> dict[str, Any]:
    return {"model": "roses", "messages": [{"role": "user", "content": text}], **more}


def test_a_server_that_is_told_to_stop_ends_a_repair(log: Log) -> None:
    held, moved = Held(at=1), list[float]()

    def script(call: ScriptedCall) -> str:
        moved.append(call.moved)
        return story(call)

    async def sleep(seconds: float) -> None:
        if any(moved):  # a candidate of the repair is being decoded
            await held.sleep(seconds)

    engine = ScriptedEngine(script, sleep=sleep)
    with (
        running(scripted(engine=engine, method=Noise())) as served,
        httpx.stream("POST", f"{served.url}/v1/chat/completions", json=body("late", stream=True)) as answer,
    ):
        lines = answer.iter_lines()
        next(line for line in lines if "Water" in line)
        assert held.reached.wait(30)
        served.server.should_exit = True
        held.go.set()
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert "forbidden" not in "".join(rest)
    assert log.request(outcome="neutralised", finish_reason="stop")


@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_that_the_server_breaks_off_is_no_success(stream: bool, log: Log) -> None:
    """As when the time for requests under way is over after SIGTERM."""
    engine = ScriptedEngine(" ".join(f"rose{number}" + "x" * 200 for number in range(400)))
    app, reader = create_app({"roses": scripted(engine=engine, max_new_tokens=500)}), Reader(4, stream=stream)
    async with anyio.create_task_group() as group:
        group.start_soon(app, CHAT_SCOPE, reader.receive, reader.send)
        await turns(3000 if stream else 100)
        group.cancel_scope.cancel()
    line = log.request(path="/v1/chat/completions")
    assert line["error"] == "cancelled"
    assert "disconnected" not in line
    assert "[DONE]" not in reader.text
    stopped = engine.steps
    await turns(500)
    assert engine.steps == stopped


@pytest.mark.parametrize("stream", [True, False])
def test_what_is_not_done_when_the_server_stops_says_so(stream: bool, log: Log) -> None:
    """Two answers are under way, one waits for a place, and five seconds are left."""

    async def ask() -> tuple[list[Reader], float]:
        engine = ScriptedEngine(CALM, step_seconds=2.0)
        limits = {"concurrency": 2, "seconds": 200.0}
        app = create_app({"roses": scripted(engine=engine)}, ServerSettings(limits=limits))
        readers = [Reader(stream=stream) for _ in range(3)]
        async with anyio.create_task_group() as group:
            for one in readers:
                group.start_soon(app, CHAT_SCOPE, one.receive, one.send)
            await anyio.sleep(20)
            app.state.drain.begin(5)
        return readers, anyio.current_time()

    readers, ended = run_in_virtual_time(ask())
    assert ended == 25.0
    assert sorted(reader.status or 0 for reader in readers) == ([200, 200, 503] if stream else [503] * 3)
    for reader in readers:
        assert "server_stopping" in reader.text
        assert "[DONE]" not in reader.text
    assert all(json.loads(line)["error"] == "ApiError" for line in log.lines if '"request"' in line)


async def test_a_client_that_leaves_several_streams_ends_all_of_them(log: Log) -> None:
    engine = ScriptedEngine(" ".join(f"rose{number}" + "x" * 200 for number in range(400)))
    app, reader = create_app({"roses": scripted(engine=engine, max_new_tokens=500)}, ServerSettings()), Reader(12)
    reader._body["n"] = 3
    async with anyio.create_task_group() as group:
        group.start_soon(app, CHAT_SCOPE, reader.receive, reader.send)
        await turns(8000)
        assert {f'"index":{number},"delta":{{"content"' in reader.text for number in range(3)} == {True}
        reader.leaves.set()
    stopped = engine.steps
    await turns(500)
    assert engine.steps == stopped < 1200
    assert len(asyncio.all_tasks()) == 1
    assert log.request(disconnected=True)


class Flower(BaseModel):
    name: str


@pytest.mark.parametrize("release", ["window", "end"])
def test_a_flagged_answer_in_a_schema_is_no_half_read_object(release: str) -> None:
    bad = '{"name": "a rose, and then comes the forbidden one, which nobody is ever to see on any screen"}'
    model = scripted(lambda call: bad.removeprefix(call.prefix), release=release)
    with running(model) as served, served.client() as api:
        asked: Any = {"model": "roses", "messages": ROSES, "response_format": Flower}
        with pytest.raises(openai.ContentFilterFinishReasonError):
            api.chat.completions.parse(**asked)
        with api.chat.completions.stream(**asked) as stream, pytest.raises(openai.ContentFilterFinishReasonError):
            list(stream)
        raw = httpx.post(f"{served.url}/v1/chat/completions", json=body(response_format={"type": "json_object"})).json()
        found = api.responses.parse(model="roses", input="Roses?", text_format=Flower)
        events = list(api.responses.create(model="roses", input="Roses?", stream=True))
    assert (raw["choices"][0]["message"]["content"], raw["choices"][0]["message"]["refusal"]) == (None, NOTICE)
    assert found.output_parsed is None
    assert found.incomplete_details is not None
    assert found.incomplete_details.reason == "content_filter"
    assert "forbidden" not in str(found) + str(events)
    assert events[-1].type == "response.incomplete"
    assert [event.refusal for event in events if event.type == "response.refusal.done"] == [NOTICE]


@pytest.mark.parametrize("text", ['{"name": "rose"}', f'{{"name": "{CALM}"}}', NOTICE])
def test_an_answer_in_a_schema_that_passes_is_whole(text: str) -> None:
    """A model may say the notice's words itself."""
    with running(scripted(lambda call: text)) as served, served.client() as api:
        asked: Any = {"model": "roses", "messages": ROSES, "response_format": {"type": "json_object"}}
        whole = api.chat.completions.create(**asked)
        chunks: Any = list(api.chat.completions.create(**asked, stream=True))
    assert whole.choices[0].message.content == text
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text


POLICIES = "[policies.default]\nthreshold = 0.5\n[policies.mild]\nthreshold = 0.99\n"


def rewritten(file: Path, text: str) -> None:
    """As a change of some time ago: what has just been written may be half of it."""
    file.write_text(text)
    os.utime(file, (1_000_000_000, 1_000_000_000))


def test_a_policy_file_that_breaks_or_loses_a_policy(tmp_path: Path, log: Log) -> None:
    file = tmp_path / "secret-names.toml"
    rewritten(file, POLICIES)
    model = scripted(policies=PolicyFile(file), policy="mild")
    with running(model, allowed_policies=("default",)) as served:

        def post(**headers: str) -> httpx.Response:
            return httpx.post(f"{served.url}/v1/chat/completions", json=body("attack"), headers=headers)

        first = post(**{"x-tta-policy": "default"})
        rewritten(file, "[policies.default]\nthreshold = broken\n")
        broken = post(**{"x-tta-policy": "default"})
        rewritten(file, POLICIES.partition("[policies.mild]")[0])
        gone, left = post(), post(**{"x-tta-policy": "default"})
        check = httpx.post(f"{served.url}/v1/checks", json={"text": "roses"})
        rewritten(file, POLICIES)
        again = post()
    for answer in (first, broken, left):
        assert answer.json()["choices"][0]["finish_reason"] == "content_filter"
    for answer in (gone, check):
        error = answer.json()["error"]
        assert (answer.status_code, error["type"], error["code"]) == (503, "server_error", "policy_unavailable")
        assert "default" not in error["message"]
        assert "secret-names" not in error["message"]
    assert any("no policy 'mild' in secret-names.toml" in line for line in log.lines)
    assert again.json()["choices"][0]["finish_reason"] == "stop"


def test_a_limit_of_tokens_holds_for_who_asks_for_none() -> None:
    model = scripted(lambda _: "rose " * 90, max_new_tokens=60)
    with running(model, keys="a sk-a max_tokens=20\nb sk-b max_tokens=500\nc sk-c") as served:
        counts = {}
        for key in ("sk-a", "sk-b", "sk-c"):
            with served.client(key) as api:
                answer = api.chat.completions.create(model="roses", messages=ROSES)
                counts[key] = (answer.usage.completion_tokens if answer.usage else 0, answer.choices[0].finish_reason)
    assert counts == {"sk-a": (20, "length"), "sk-b": (60, "length"), "sk-c": (60, "length")}


async def test_a_server_whose_lifespan_nobody_runs_does_not_say_that_it_is_loading() -> None:
    inner = create_app({"roses": scripted()})
    site = Starlette(routes=[Mount("/ai", inner)])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(site), base_url="http://site") as client:
        before = await client.get("/ai/ready")
        assert (await client.post("/ai/v1/chat/completions", json=body())).status_code == 200
    assert (before.status_code, before.json()) == (503, {"status": "not_started"})


async def test_a_model_that_cannot_be_loaded_is_no_fault_of_the_request() -> None:
    class Unset(ScriptedEngine):
        async def load(self) -> None:
            raise ConfigurationError("no such folder: /srv/secret-place")

    site = Starlette(routes=[Mount("/ai", create_app({"roses": scripted(engine=Unset("x"))}))])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(site), base_url="http://site") as client:
        for stream in (False, True):
            answer = await client.post("/ai/v1/chat/completions", json=body(stream=stream))
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_unavailable")
            assert "secret-place" not in answer.text


async def test_a_model_that_cannot_be_freed_leaves_no_other_behind() -> None:
    freed = list[str]()

    class Closing(TTAChatModel):
        async def aclose(self) -> None:
            freed.append(self.model)
            raise OSError(self.model)

    models = {name: Closing(model=name, moderator="local") for name in ("one", "two")}
    with pytest.raises(OSError, match=r"one|two"):
        await ServedModels(models).aclose()
    assert sorted(freed) == ["one", "two"]
