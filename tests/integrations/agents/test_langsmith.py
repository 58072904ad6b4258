"""What a LangSmith server is sent: the real client, over loopback HTTP."""

from __future__ import annotations

import asyncio
import gzip
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from langchain.agents.middleware import AgentMiddleware, TracePolicy, omit_payload
from langchain_core.messages import AIMessage, ToolMessage
from langsmith import Client, tracing_context
from tta_langchain_agents.testing import ScriptedChatModel

sys.path.insert(0, str(Path(__file__).parent))
from staged_agent import BAD, HELLO, call, guard, local_model, look_up

pytestmark = [
    pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainBetaWarning"),
    pytest.mark.filterwarnings("ignore:astream_log is deprecated"),
]


class Collector(BaseHTTPRequestHandler):
    """Takes whatever comes and keeps it."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.sent.append(body)  # type: ignore[attr-defined]
        self._answer()

    do_PATCH = do_POST

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: Any) -> None:
        """Quiet."""


class Traced:
    """A client of a collector, and what the collector has been sent."""

    def __init__(self, server: Any) -> None:
        self.server = server
        url = f"http://127.0.0.1:{server.server_port}"
        self.client = Client(api_url=url, api_key="none", auto_batch_tracing=False)

    @property
    def sent(self) -> str:
        return b"\n".join(self.server.sent).decode()


@pytest.fixture
def traced() -> Iterator[Traced]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        server.sent = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        traced = Traced(server)
        yield traced
        traced.client.close()
        server.shutdown()
        thread.join()


class Answers(AgentMiddleware[Any, Any, Any]):
    """Answers by itself, after or instead of the model."""

    def __init__(self, calls_on: bool) -> None:
        super().__init__()
        self.calls_on = calls_on

    def wrap_model_call(self, request: Any, handler: Any) -> Any:
        if self.calls_on:
            handler(request)
        return AIMessage(BAD)

    async def awrap_model_call(self, request: Any, handler: Any) -> Any:
        if self.calls_on:
            await handler(request)
        return AIMessage(BAD)


class AnswersForTheTool(AgentMiddleware[Any, Any, Any]):
    def wrap_tool_call(self, request: Any, handler: Any) -> Any:
        return ToolMessage("flagme", tool_call_id=request.tool_call["id"])

    async def awrap_tool_call(self, request: Any, handler: Any) -> Any:
        return self.wrap_tool_call(request, handler)


class Swaps(AgentMiddleware[Any, Any, Any]):
    """Puts another model in the agent's place, whose answer it sees raw only if that is not guarded."""

    def wrap_model_call(self, request: Any, handler: Any) -> Any:
        return handler(request.override(model=ScriptedChatModel(answers=[BAD])))

    async def awrap_model_call(self, request: Any, handler: Any) -> Any:
        return await handler(request.override(model=ScriptedChatModel(answers=[BAD])))


async def run_all_ways(agent: Any) -> None:
    await agent.ainvoke(HELLO)
    await asyncio.to_thread(agent.invoke, HELLO)
    async for _ in agent.astream(HELLO, stream_mode="messages"):
        pass


@pytest.mark.parametrize(
    ("answers", "other"),
    [
        (["fine"], Answers(calls_on=True)),
        (["fine"], Answers(calls_on=False)),
        (["fine"], Swaps()),
        ([call(word="x"), "done", call(word="x"), "done", call(word="x"), "done"], AnswersForTheTool()),
    ],
    ids=["after the model", "instead of the model", "another model", "instead of a tool"],
)
async def test_a_span_of_another_middleware_holds_nothing_raw(
    watched: Any, traced: Traced, answers: Any, other: Any
) -> None:
    run = watched(answers, tools=[look_up], middleware=[guard(), other])
    with tracing_context(enabled=True, client=traced.client):
        await run_all_ways(run.agent.with_config(configurable={"thread_id": "one"}))
    assert "TTAMiddleware.awrap_model_call" in traced.sent
    assert "withheld" in traced.sent or "help with that request" in traced.sent
    assert "flagme" not in traced.sent


async def test_the_models_own_span_is_sent_under_the_agents(watched: Any, traced: Traced) -> None:
    run = watched(["fine words"], middleware=[guard(), Swaps()])
    with tracing_context(enabled=True, client=traced.client):
        await run.agent.ainvoke(HELLO, run.config)
    assert "GuardedChatModel" in traced.sent


@pytest.mark.slow
async def test_tools_and_models_that_guard_themselves_have_their_spans(watched: Any, traced: Traced) -> None:
    run = watched([call(word="x"), "done"], tools=[look_up], middleware=[guard(), AnswersForTheTool(), Swaps()])
    own = watched([], model=local_model("fine"), middleware=[guard()])
    plain = watched([call(word="x"), "done"], tools=[look_up], middleware=[guard()])
    with tracing_context(enabled=True, client=traced.client):
        for one in (run, own, plain):
            await one.agent.ainvoke(HELLO, one.config)
    assert '"name":"TTAChatModel"' in traced.sent
    assert '"name":"look_up"' in traced.sent


async def test_around_the_guard_a_trace_policy_closes_it(watched: Any, traced: Traced) -> None:
    """A middleware before the guard in the list: only its own policy can see to its span."""

    class Outer(Answers):
        trace_policy = TracePolicy(process_outputs=omit_payload)

    run = watched(["fine"], middleware=[Outer(calls_on=True), guard()])
    with tracing_context(enabled=True, client=traced.client):
        await run.agent.ainvoke(HELLO, run.config)
    spans = [body.decode() for body in traced.server.sent if b"Outer.awrap_model_call" in body]
    assert spans
    assert not any("flagme" in span for span in spans)
