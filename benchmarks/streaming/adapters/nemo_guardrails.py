"""NeMo Guardrails: an output rail that asks the moderation endpoint, with streaming as it comes and held."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from functools import cache
from typing import Any

import httpx
from lines import main

os.environ.update(OPENAI_API_KEY="k", NEMO_GUARDRAILS_NO_USAGE_STATS="1")

from nemoguardrails import LLMRails, RailsConfig
from nemoguardrails.actions import action
from nemoguardrails.actions.rail_outcome import RailOutcome

RAIL = """
define flow moderate output
  $response = execute moderate_output(text=$bot_message)
  if $response.is_blocked
    bot refuse to respond
    stop
"""
STREAMING = {"default": {"enabled": True}, "held": {"enabled": True, "stream_first": False}}


@cache
def service(base_url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=base_url)


@cache
def rails(base_url: str, kind: str) -> LLMRails:
    @action(name="moderate_output")
    async def moderate_output(text: str, **_: Any) -> RailOutcome:
        answer = await service(base_url).post("/moderations", json={"input": text})
        return RailOutcome.block() if answer.json()["results"][0]["flagged"] else RailOutcome.allow()

    settings: dict[str, Any] = {
        "models": [{"type": "main", "engine": "openai", "model": "scripted", "parameters": {"base_url": base_url}}]
    }
    if kind in STREAMING:
        settings["rails"] = {"output": {"flows": ["moderate output"], "streaming": STREAMING[kind]}}
    made = LLMRails(RailsConfig.from_content(RAIL, config=settings))
    made.register_action(moderate_output)
    return made


async def stream(job: dict[str, Any]) -> AsyncIterator[str]:
    messages = [{"role": "user", "content": job["question"]}]
    async for piece in rails(job["base_url"], job["kind"]).stream_async(messages=messages):
        yield piece


if __name__ == "__main__":
    main({"unguarded": stream, "default": stream, "held": stream})
