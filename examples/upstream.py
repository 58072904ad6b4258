"""A guard in front of a server that you run already: Ollama, llama.cpp, vLLM, or a paid API.

    UPSTREAM=http://127.0.0.1:11434/v1 UPSTREAM_MODEL=llama3.2 python examples/upstream.py

Without ``UPSTREAM`` a stand-in answers: a server of this process whose model follows a script. As a command it is
``tta serve --upstream ...`` (docs/server.md).
"""

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import uvicorn

from tta_middleware import TTAChatModel
from tta_middleware.server import create_app
from tta_middleware.server.upstream import UpstreamModel, UpstreamSettings
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine

QUESTIONS = ("How do I keep roses?", "What do you think of my neighbour?")


def script(call: ScriptedCall) -> str:
    if "neighbour" in call.text:
        return "Your neighbour is a worthless idiot, and I hope that he suffers and dies."
    return "Water them early in the morning, and cut the dry wood in spring."


@asynccontextmanager
async def stand_in() -> AsyncIterator[str]:
    """The URL of an unguarded server."""
    listener = socket.create_server(("127.0.0.1", 0))
    unguarded = TTAChatModel(model=ScriptedEngine(script), policy=1.0, method="none")
    server = uvicorn.Server(uvicorn.Config(create_app({"unguarded": unguarded}), log_level="warning"))
    serving = asyncio.create_task(server.serve([listener]))
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    server.should_exit = True
    await serving


@asynccontextmanager
async def upstream() -> AsyncIterator[tuple[str, str]]:
    """Where the model is, and what it is called there."""
    if url := os.environ.get("UPSTREAM"):
        yield url, os.environ["UPSTREAM_MODEL"]
        return
    async with stand_in() as url:
        yield url, "unguarded"


async def main() -> None:
    async with upstream() as (url, name):
        settings = UpstreamSettings(upstream=url, upstream_model=name, moderator="local", policy=0.4)
        app = create_app({"guarded": UpstreamModel(settings)})
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://here", timeout=120) as http,
        ):
            for question in QUESTIONS:
                body = {"model": "guarded", "messages": [{"role": "user", "content": question}]}
                answer = (await http.post("/v1/chat/completions", json=body)).json()
                choice = answer["choices"][0]
                print(f"> {question}\n{choice['message']['content']} [{choice['finish_reason']}]")


if __name__ == "__main__":
    asyncio.run(main())
