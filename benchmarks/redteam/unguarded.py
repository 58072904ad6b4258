"""The model without the guard, for comparison: one plain route over its engine. For benchmarks only; never serve this.

python benchmarks/redteam/unguarded.py --port 9001
"""

from __future__ import annotations

import argparse
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from tta_middleware import Message, Sampling
from tta_middleware.registry import resolve_engine
from tta_middleware.types import GenerationRequest


def app(model: str, most_tokens: int) -> Starlette:
    engine = resolve_engine(model)

    async def answer(request: Request) -> JSONResponse:
        asked: dict[str, Any] = await request.json()
        prompt = await engine.embed([Message(turn["role"], str(turn["content"])) for turn in asked["messages"]])
        sampling = Sampling(max_new_tokens=most_tokens, temperature=0.0)
        [done] = await engine.generate_batch([GenerationRequest(prompt, sampling)])
        message = {"role": "assistant", "content": done.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": done.finish_reason}
        used = {"prompt_tokens": len(prompt.token_ids), "completion_tokens": len(done.token_ids)}
        about = {"id": "chatcmpl-0", "object": "chat.completion", "created": int(time.time()), "model": asked["model"]}
        return JSONResponse(about | {"choices": [choice], "usage": used | {"total_tokens": sum(used.values())}})

    async def ready(_: Request) -> JSONResponse:
        await engine.load()
        return JSONResponse({"status": "ready"})

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await engine.aclose()

    routes = [Route("/v1/chat/completions", answer, methods=["POST"]), Route("/ready", ready)]
    return Starlette(routes=routes, lifespan=lifespan)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    given = parser.parse_args()
    uvicorn.run(app(given.model, given.max_new_tokens), port=given.port, log_level="warning", timeout_keep_alive=600)
