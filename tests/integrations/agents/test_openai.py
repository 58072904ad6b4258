"""A remote model through the real OpenAI client, over loopback HTTP."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from langchain_core.exceptions import ModelRefusalError
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
from tta_langchain_agents import GuardedChatModel, TTAMiddleware

from tta_middleware.errors import EngineError
from tta_middleware.policy import DEFAULT_NOTICE
from tta_middleware.testing.scripted_moderator import ScriptedModerator

SAFE = "A safe sentence about trees and rivers. " * 6
HELLO = {"messages": [("user", "hello")]}


class Completions(BaseHTTPRequestHandler):
    """Answers with the server's script, word by word where a stream is asked for."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        script: list[dict[str, Any]] = self.server.script  # type: ignore[attr-defined]
        answer = script.pop(0) if len(script) > 1 else script[0]
        body = _events(answer) if asked.get("stream") else json.dumps(_completion("message", answer)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream" if asked.get("stream") else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


def _completion(key: str, content: dict[str, Any], finish: str | None = "stop") -> dict[str, Any]:
    choice = {"index": 0, key: {"role": "assistant", **content}, "finish_reason": finish}
    usage = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    kind = "chat.completion" if key == "message" else "chat.completion.chunk"
    return {"id": "chatcmpl-7", "object": kind, "created": 0, "model": "m", "choices": [choice], "usage": usage}


def _events(answer: dict[str, Any]) -> bytes:
    deltas: list[dict[str, Any]] = [{"content": f"{word} "} for word in (answer["content"] or "").split()]
    for call in answer.get("tool_calls", ()):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        deltas.append({"tool_calls": [{**call, "index": 0, "function": {"name": name, "arguments": arguments[:5]}}]})
        deltas.append({"tool_calls": [{"index": 0, "function": {"arguments": arguments[5:]}}]})
    chunks = [_completion("delta", delta, None) | {"usage": None} for delta in deltas]
    lines = [json.dumps(chunk) for chunk in [*chunks, _completion("delta", {}) | {"usage": None}]]
    return "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"]).encode()


@pytest.fixture
def remote() -> Iterator[Any]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Completions) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def say(text: str) -> dict[str, Any]:
    return {"content": text}


def look_up_call(word: str) -> dict[str, Any]:
    arguments = json.dumps({"word": word})
    return {"content": None, "tool_calls": [_call(arguments)]}


def _call(arguments: str) -> dict[str, Any]:
    return {"id": "call-1", "type": "function", "function": {"name": "look_up", "arguments": arguments}}


def chat(remote: Any) -> ChatOpenAI:
    """With clients of its own: LangChain would share one with an earlier test whose server had the same port."""
    return ChatOpenAI(
        model="m",
        base_url=f"http://127.0.0.1:{remote.server_port}/v1",
        api_key="none",
        max_retries=0,
        http_client=httpx.Client(),
        http_async_client=httpx.AsyncClient(),
    )


class Person(BaseModel):
    """Somebody."""

    name: str


@pytest.mark.parametrize("method", ["json_schema", "json_mode"])
async def test_structured_output_is_asked_for_as_by_itself(remote: Any, method: str) -> None:
    model = chat(remote)
    guarded = GuardedChatModel(inner=model, moderator=ScriptedModerator()).with_structured_output(Person, method=method)
    remote.script = [say('{"name": "Ada"}')]
    assert await guarded.ainvoke("who?") == Person(name="Ada")
    for bad in (r'{"name": "\u0066lagme"}', '{"nobody": "flagme"}'):
        remote.script = [say(bad)]
        with pytest.raises((ModelRefusalError, EngineError)) as caught:
            await guarded.ainvoke("who?")
        assert "lagme" not in repr(caught.value)
    model.root_client.close()
    await model.root_async_client.close()


@tool
def look_up(word: str) -> str:
    """Look a word up."""
    return f"{word} means well"


@pytest.mark.parametrize("way", ["invoke", "ainvoke", "stream", "astream"])
@pytest.mark.parametrize("script", [[say(SAFE)], [say(SAFE + "flagme")], [look_up_call("flagme")]])
async def test_what_a_remote_model_says_is_guarded(watched: Any, remote: Any, way: str, script: list[Any]) -> None:
    bad = "flagme" in json.dumps(script)
    remote.script = [look_up_call("good"), *script]
    model = chat(remote)
    run = watched([], model=model, tools=[look_up], middleware=[TTAMiddleware(ScriptedModerator())])
    match way:
        case "invoke":
            await asyncio.to_thread(run.agent.invoke, HELLO, run.config)
        case "ainvoke":
            await run.agent.ainvoke(HELLO, run.config)
        case "stream":
            run.seen += await asyncio.to_thread(
                lambda: list(run.agent.stream(HELLO, run.config, stream_mode="messages"))
            )
        case "astream":
            run.seen += [item async for item in run.agent.astream(HELLO, run.config, stream_mode="messages")]
    first, result, last = run.messages[1:]
    assert first.tool_calls[0]["args"] == {"word": "good"}
    assert result.text == "good means well"
    assert last.text.endswith(DEFAULT_NOTICE) if bad else last.text.split() == SAFE.split()
    assert last.response_metadata["tta"]["outcome"] == ("blocked" if bad else "clean")
    assert last.response_metadata["model_name"] == "m"
    assert last.id == "chatcmpl-7" or last.id.startswith("lc_run-")
    assert not run.leaks()
    model.root_client.close()
    await model.root_async_client.close()
