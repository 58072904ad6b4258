"""A FastAPI application with routes of its own and OpenAI's protocol over a guarded model below ``/ai``.

uvicorn examples.fastapi_app:app        # then OPENAI_BASE_URL=http://127.0.0.1:8000/ai/v1
"""

import asyncio

import httpx
from fastapi import FastAPI

from tta_middleware import TTAChatModel
from tta_middleware.server import Limits, ServerSettings, create_app

model = TTAChatModel(model="smollm2", moderator="local", max_new_tokens=24)
guarded = create_app({"small": model}, ServerSettings(limits=Limits(concurrency=4, seconds=60)))

# Its lifespan loads the model when the application starts and frees it when it stops.
app = FastAPI(title="Garden helper", lifespan=lambda _: guarded.router.lifespan_context(guarded))


@app.get("/tips/{plant}")
async def tip(plant: str) -> dict[str, str]:
    """A route of your own, over the same model."""
    message = await model.ainvoke(f"One tip for growing {plant}, in one short sentence.")
    return {"tip": message.text, "outcome": message.response_metadata["tta"]["outcome"]}


app.mount("/ai", guarded)


async def main() -> None:
    """Ask the application without a socket."""
    body = {"model": "small", "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://here", timeout=120) as http,
    ):
        print((await http.get("/tips/roses")).json())
        answer = await http.post("/ai/v1/chat/completions", json=body)
        print(answer.headers["x-tta-outcome"], repr(answer.json()["choices"][0]["message"]["content"]))


if __name__ == "__main__":
    asyncio.run(main())
