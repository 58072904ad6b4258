"""A guarded server on a loopback port, in a thread of this process, over scripted parts; and what it logs."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import openai
import uvicorn

from tta_middleware import TTAChatModel
from tta_middleware.config import Windows
from tta_middleware.server import ServerSettings, create_app
from tta_middleware.server.keys import Keys, KeySource
from tta_middleware.server.request_log import JsonLines
from tta_middleware.testing.delays import Unequal, slow_even
from tta_middleware.testing.loopback import on_loopback
from tta_middleware.testing.scripted_engine import Script, ScriptedCall, ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging

CALM = "Water the roses early in the morning, and give the old apple tree some compost before the first frost comes."
BAD = f"{CALM} Then comes the forbidden part of it, which nobody is ever to see on any screen at all."
THOUGHT = "They ask about roses. Roses want water and sun, and that is what I am going to tell them."
NOTICE = "I can't help with that request."


def story(call: ScriptedCall) -> str:
    """Prompts with 'attack' get a bad answer, those with 'late' until the prompt is moved, the rest a calm one."""
    if "attack" in call.text:
        return BAD.removeprefix(call.prefix)
    if "late" in call.text and call.moved < 0.3:
        return BAD.removeprefix(call.prefix)
    if call.prefix:
        return " And then rest in the shade for a while, with a cup of tea and a good long book about gardens."
    return CALM


def scripted(script: Script = story, **settings: Any) -> TTAChatModel:
    """A chat model over a script; every other check is overtaken by the one after it."""
    engine = settings.pop("engine", None) or ScriptedEngine(script)
    moderator = settings.pop("moderator", None) or Unequal(ScriptedModerator(score=flagging("forbidden")), slow_even)
    given = {"windows": Windows(first=24, largest=48), "method": "none", "seed": 1, **settings}
    return TTAChatModel(model=engine, moderator=moderator, **given)


def thinking_model(mode: str, **settings: Any) -> TTAChatModel:
    """A chat model that thinks :data:`THOUGHT` before it answers; ``mode`` says what becomes of that."""

    def script(call: ScriptedCall) -> str:
        return CALM if "</think>" in call.prefix else f"<think>\n{THOUGHT}\n</think>\n\n{CALM}"

    engine = ScriptedEngine(script, thinking=True, template=("enable_thinking", "reasoning_effort"))
    return scripted(engine=engine, reasoning=mode, **settings)


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


@dataclass
class Served:
    """A running server."""

    url: str
    server: uvicorn.Server

    def client(self, key: str = "none", **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **options)

    def aclient(self, key: str = "none") -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)


Serving = Callable[..., AbstractContextManager[Served]]


@contextmanager
def running(
    models: TTAChatModel | Mapping[str, Any] | None = None, *, keys: str | KeySource = "", **settings: Any
) -> Iterator[Served]:
    """A server that stops when the block ends; one model is served as ``roses``."""
    served = models if isinstance(models, Mapping) else {"roses": models or scripted()}
    known = Keys.parse(keys) if isinstance(keys, str) else keys
    app = create_app(served, ServerSettings(**settings), keys=known)
    with on_loopback(app, backlog=256, timeout_graceful_shutdown=20) as loopback:
        yield Served(loopback.url, loopback.server)


CHAT_SCOPE: dict[str, Any] = {
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
"""A request of the application by itself."""


class Reader:
    """A client of the application that reads some pieces of the answer, then none until it is told, and may leave."""

    def __init__(self, pieces: int = 10_000, *, stream: bool = True, text: str = "Roses?") -> None:
        self.sent: list[bytes] = []
        self.status: int | None = None
        self.reads, self.leaves = anyio.Event(), anyio.Event()
        self._pieces, self._asked = pieces, False
        messages = [{"role": "user", "content": text}]
        self._body = {"model": "roses", "messages": messages, "stream": stream}

    async def receive(self) -> dict[str, Any]:
        if self._asked:
            await self.leaves.wait()
            return {"type": "http.disconnect"}
        self._asked = True
        return {"type": "http.request", "body": json.dumps(self._body).encode()}

    @property
    def text(self) -> str:
        """What it was sent."""
        return b"".join(self.sent).decode()

    async def send(self, message: Any) -> None:
        self.status = message.get("status", self.status)
        self.sent.append(message.get("body", b""))
        if len(self.sent) > self._pieces:
            await self.reads.wait()


@dataclass
class Log(logging.Handler):
    """The server's log lines, as they are written."""

    lines: list[str] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonLines())

    __hash__ = object.__hash__

    def emit(self, record: logging.LogRecord) -> None:
        with self._changed:
            self.lines.append(self.format(record))
            self._changed.notify_all()

    def request(self, **wanted: object) -> dict[str, Any]:
        """The first request's line that says all of this; waits until there is one."""

        def found() -> dict[str, Any] | None:
            parsed = [json.loads(line) for line in self.lines]
            return next((one for one in parsed if {**one, **wanted, "message": "request"} == one), None)

        with self._changed:
            assert self._changed.wait_for(found, timeout=30), self.lines
            return found() or {}
