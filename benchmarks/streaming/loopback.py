"""A loopback server that plays the chat model and the moderation service, in a process of its own.

``/v1/chat/completions`` streams the scripted answer to the last message on a fixed timetable, ``/v1/moderations``
answers after the set latency, ``/control`` sets it and tells what was asked for since the last time.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from answers import SECONDS, chunks, text
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tta_middleware.testing.fault_server import moderations

_answer_moderation = moderations()


class Service:
    """The server's state: the latency, and the requests since the last time it was asked."""

    def __init__(self) -> None:
        self.latency = 0.0
        self.calls: list[int] = []
        self.completions = 0

    async def control(self, request: Request) -> Response:
        seen = {"calls": len(self.calls), "characters": sum(self.calls), "completions": self.completions}
        self.latency = (await request.json())["latency"]
        self.calls, self.completions = [], 0
        return JSONResponse(seen)

    async def moderate(self, request: Request) -> Response:
        try:
            body = await request.json()
        except ClientDisconnect:  # a check that was cancelled on its way here
            return Response()
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        self.calls.append(sum(map(len, texts)))
        await asyncio.sleep(self.latency)
        return JSONResponse(_answer_moderation(body))

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        self.completions += 1
        question = _question(body["messages"])
        if body.get("stream"):
            return StreamingResponse(_events(question), media_type="text/event-stream")
        await asyncio.sleep(len(chunks(question)) * SECONDS)
        message = {"role": "assistant", "content": text(question)}
        return JSONResponse(_body("chat.completion", {"message": message, "finish_reason": "stop"}))


def _question(messages: Any) -> str:
    """The last question in the request; a system may wrap it in instructions of its own."""
    return re.findall(r"(?:clean|flagged) \d+", json.dumps(messages))[-1]


async def _events(question: str) -> AsyncIterator[str]:
    due = time.perf_counter()
    for piece in chunks(question):
        due += SECONDS
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        yield _event({"delta": {"role": "assistant", "content": piece}, "finish_reason": None})
    yield _event({"delta": {}, "finish_reason": "stop"}) + "data: [DONE]\n\n"


def _event(choice: dict[str, Any]) -> str:
    return f"data: {json.dumps(_body('chat.completion.chunk', choice))}\n\n"


def _body(kind: str, choice: dict[str, Any]) -> dict[str, Any]:
    choices = [{"index": 0, "logprobs": None, **choice}]
    return {"id": "chatcmpl-1", "object": kind, "created": 1, "model": "scripted", "choices": choices}


def main() -> None:
    service = Service()
    routes = [
        Route("/v1/chat/completions", service.complete, methods=["POST"]),
        Route("/v1/moderations", service.moderate, methods=["POST"]),
        Route("/control", service.control, methods=["POST"]),
    ]
    listener = socket.create_server(("127.0.0.1", 0))
    # Accepted sockets inherit it; asyncio would not set it on them, and head and body of an answer leave separately.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    print(listener.getsockname()[1], flush=True)
    config = uvicorn.Config(Starlette(routes=routes), log_level="warning", access_log=False)
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
