"""A server in a process of its own, and clients that speak HTTP by hand: what ``server_load.py`` is made of.

The server's process counts what is left in it: tasks, sockets, places, sequences of the engine, what the auditor found.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import anyio
import uvicorn
from langchain_core.messages import AIMessage, AIMessageChunk

from tta_middleware import TTAChatModel
from tta_middleware.config import Budget
from tta_middleware.errors import ModerationUnavailableError
from tta_middleware.moderation.retry import RetryPolicy
from tta_middleware.policy import StagePolicies
from tta_middleware.server import ServerSettings, create_app
from tta_middleware.server.upstream import UpstreamModel, UpstreamSettings
from tta_middleware.testing.auditor import Auditor
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging
from tta_middleware.types import Message, Verdict

CALM = "Water the roses early in the morning, and give the old apple tree some compost before the first frost comes. "
MARK = "forbidden"
BAD = f"{CALM}Then comes the {MARK} part of it, which nobody is ever to see on any screen. {CALM}"


BUDGET = Budget(generations=8)
"""An answer to 'attack' is flagged whatever is tried."""


def story(call: ScriptedCall) -> str:
    """Calm answers; those to 'attack' hold the mark, those to 'late' until the prompt is moved."""
    if "attack" in call.text or ("late" in call.text and call.moved < 0.3):
        return (BAD * 2).removeprefix(call.prefix)
    return (CALM * 4).removeprefix(call.prefix) if not call.prefix else " And then rest in the shade for a while."


class Judge(ScriptedModerator):
    """Takes its time, and fails now and then."""

    def __init__(self, seconds: float, failing: float) -> None:
        super().__init__(score=flagging(MARK))
        self.seconds, self.failing, self.rng = seconds, failing, random.Random(7)

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        await anyio.sleep(self.seconds)
        if self.rng.random() < self.failing:
            raise ModerationUnavailableError("away for a moment", cause="timeout")
        verdicts = await super().moderate(texts, prompt=prompt)
        self.calls.clear()
        self.prompts.clear()
        return verdicts


@dataclass
class Unguarded:
    """The engine's own words, as they come: what a server without a guard would do."""

    engine: ScriptedEngine
    policy: Any = None
    prompt_check: Any = "off"
    scorer: ScriptedModerator = field(default_factory=ScriptedModerator)

    def policies_in_force(self, name: str | None = None) -> StagePolicies:
        return StagePolicies.of(None).with_default(1.0)

    async def aload(self) -> None: ...

    async def aclose(self) -> None: ...

    def answering(self, asked: Any, stages: StagePolicies, most_tokens: int | None) -> RawAnswer:
        return RawAnswer(self.engine, asked.last_user_text)


@dataclass
class RawAnswer:
    """One answer of :class:`Unguarded`."""

    engine: ScriptedEngine
    text: str

    async def whole(self) -> AIMessage:
        return AIMessage("".join([str(chunk.text) async for chunk in self.stream()]))

    async def stream(self) -> AsyncGenerator[AIMessageChunk, None]:
        from tta_middleware.types import GenerationRequest, Sampling

        prompt = await self.engine.embed([Message("user", self.text)])
        stream = self.engine.stream(GenerationRequest(prompt, Sampling(max_new_tokens=2_000)))
        try:
            async for delta in stream:
                if delta.text:
                    yield AIMessageChunk(content=delta.text)
        finally:
            await stream.aclose()
        yield AIMessageChunk(content="", response_metadata={"finish_reason": "stop"})


@dataclass(frozen=True)
class Setup:
    """What a server serves: ``guarded``, ``unguarded``, or ``upstream`` of another one."""

    kind: str
    step: float
    moderation: float = 0.05
    failing: float = 0.0
    upstream: str = ""
    port: int = 0
    concurrency: int = 64
    name: str = "roses"
    audited: bool = True


def _app(setup: Setup) -> tuple[Any, ScriptedEngine]:
    engine, judge = ScriptedEngine(story, step_seconds=setup.step), Judge(setup.moderation, setup.failing)
    models: dict[str, Any] = {
        "unguarded": lambda: Unguarded(engine),
        "guarded": lambda: TTAChatModel(model=engine, moderator=judge, method="race", budget=BUDGET, seed=1),
        "upstream": lambda: UpstreamModel(
            UpstreamSettings(upstream=f"{setup.upstream}/v1", moderator=judge, retry=RetryPolicy(attempts=3))
        ),
    }
    limits = {"concurrency": setup.concurrency, "queue": 10_000, "seconds": 300.0, "drain_seconds": 120}
    return create_app({setup.name: models[setup.kind]()}, ServerSettings(limits=limits)), engine


class ServerProcess:
    """``with`` starts it; ``report()`` says what is in it now."""

    def __init__(self, setup: Setup) -> None:
        self._pipe, there = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("spawn").Process(target=_main, args=(there, setup), daemon=True)

    def __enter__(self) -> Self:
        self.process.start()
        self.port: int = self._pipe.recv()
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.is_alive():
            os.kill(self.process.pid or 0, signal.SIGTERM)
            self.process.join(30)

    def report(self) -> dict[str, Any]:
        self._pipe.send("report")
        found: dict[str, Any] = self._pipe.recv()
        return found

    def signal(self, number: int) -> None:
        os.kill(self.process.pid or 0, number)


def _main(pipe: Connection, setup: Setup) -> None:
    app, engine = _app(setup)
    server = uvicorn.Server(
        uvicorn.Config(app, port=setup.port, log_level="error", access_log=False, timeout_graceful_shutdown=120)
    )
    audit = Auditor()
    with audit if setup.audited else nullcontext():
        asyncio.run(_serve(server, pipe, engine, audit))


async def _serve(server: uvicorn.Server, pipe: Connection, engine: ScriptedEngine, audit: Auditor) -> None:
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110  uvicorn has no event for it
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    pipe.send(port)
    idle = set(asyncio.all_tasks())
    while not serving.done():
        if pipe.poll():
            pipe.recv()
            pipe.send(_left(idle, engine, audit, server))
        await asyncio.sleep(0.02)
    await serving


def _left(idle: set[Any], engine: ScriptedEngine, audit: Auditor, server: uvicorn.Server) -> dict[str, Any]:
    sockets = [file for file in Path("/proc/self/fd").iterdir() if file.is_socket()]
    memory = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    audit.scored.clear()  # the auditor keeps every text that was scored, which is no memory of the server's
    return {
        "tasks": len({task for task in asyncio.all_tasks() if not task.done()} - idle),
        "connections": len(server.server_state.connections),
        "sockets": len(sockets),
        "steps": engine.steps,
        "uncovered": len(audit.findings),
        "audited": audit.requests,
        "mib": round(memory / 2**20, 1),
    }


@dataclass
class Visit:
    """One request, and what came of it.

    Attributes:
        asked: the prompt.
        first: seconds until the first text.
        whole: the stream ended as it should.
    """

    asked: str = ""
    first: float | None = None
    seconds: float = 0.0
    status: int = 0
    text: str = ""
    whole: bool = False
    left: bool = False


async def visit(
    port: int, text: str, *, stream: bool = True, leaves_after: int | None = None, slow: bool = False
) -> Visit:
    """Ask once. ``leaves_after`` bytes the client goes; a ``slow`` one reads a little at a time."""
    found, begun = Visit(text), time.perf_counter()
    body = {"model": "roses", "stream": stream, "messages": [{"role": "user", "content": text}]}
    data = json.dumps(body).encode()
    limit = 2_048 if slow else 2**16
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=limit)
    except OSError:
        return found
    try:
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(data)}\r\n\r\n"
        )
        writer.write(head.encode() + data)
        received = b""
        while part := await reader.read(256 if slow else 65_536):
            received += part
            if found.first is None and b'"content":"' in received.replace(b'"content":""', b""):
                found.first = time.perf_counter() - begun
            if leaves_after is not None and len(received) > leaves_after:
                found.left = True
                break
            if slow:
                await asyncio.sleep(0.005)
    except OSError:
        pass
    finally:
        writer.close()
    found.seconds = time.perf_counter() - begun
    _read(found, received, stream=stream)
    return found


def _read(found: Visit, received: bytes, *, stream: bool) -> None:
    head, _, body = received.partition(b"\r\n\r\n")
    found.status = int(head[9:12] or 0)
    found.text = body.decode(errors="replace")
    ends = b"data: [DONE]" in body[-40:] if stream else b'"finish_reason"' in body
    found.whole = found.status == 200 and ends


def percentile(values: Sequence[float], share: float) -> float:
    """Of sorted values, nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as Markdown."""
    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    return "\n".join([*lines, *(f"| {' | '.join(str(row[name]) for name in names)} |" for row in rows)])
