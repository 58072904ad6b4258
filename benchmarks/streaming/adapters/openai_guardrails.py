"""OpenAI Guardrails: the drop-in client with its Moderation check on the output."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import cache
from typing import Any

from guardrails import GuardrailsAsyncOpenAI
from lines import main
from openai import AsyncOpenAI

PIPELINE = {"version": 1, "output": {"version": 1, "guardrails": [{"name": "Moderation", "config": {}}]}}


@cache
def client(base_url: str, guarded: bool) -> AsyncOpenAI:
    if guarded:
        return GuardrailsAsyncOpenAI(config=PIPELINE, raise_guardrail_errors=True, base_url=base_url, api_key="k")
    return AsyncOpenAI(base_url=base_url, api_key="k")


async def stream(job: dict[str, Any]) -> AsyncIterator[str]:
    completions = client(job["base_url"], job["kind"] != "unguarded").chat.completions
    messages: Any = [{"role": "user", "content": job["question"]}]
    async for chunk in await completions.create(model="scripted", messages=messages, stream=True):
        yield chunk.choices[0].delta.content or ""


if __name__ == "__main__":
    main({"unguarded": stream, "client": stream})
