"""Guardrails AI: a streaming guard with a validator that asks the moderation endpoint."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from functools import cache
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # the list would be fetched otherwise

import httpx
import litellm
from guardrails import AsyncGuard, Guard
from guardrails.settings import settings
from guardrails.validators import FailResult, PassResult, ValidationResult, Validator, register_validator
from lines import main

settings.rc.enable_metrics = False


@register_validator(name="moderation-endpoint", data_type="string")
class ModerationEndpoint(Validator):
    """Fails what the endpoint flags; cut into sentences, as validators are by default."""

    def __init__(self, base_url: str, on_fail: str) -> None:
        super().__init__(on_fail=on_fail, base_url=base_url)
        self._client = httpx.Client(base_url=base_url)

    def _validate(self, value: Any, metadata: dict[str, Any]) -> ValidationResult:
        answer = self._client.post("/moderations", json={"input": value})
        flagged = answer.json()["results"][0]["flagged"]
        return FailResult(error_message="flagged", fix_value="") if flagged else PassResult()


@cache
def guard(base_url: str, kind: str) -> Any:
    validator = ModerationEndpoint(base_url, on_fail="fix" if kind == "sync-fix" else "exception")
    made = (AsyncGuard if kind == "async" else Guard)().use(validator)
    made.configure(allow_metrics_collection=False)
    return made


def request(job: dict[str, Any]) -> dict[str, Any]:
    messages = [{"role": "user", "content": job["question"]}]
    return {
        "model": "openai/scripted",
        "messages": messages,
        "stream": True,
        "api_base": job["base_url"],
        "api_key": "k",
    }


async def unguarded(job: dict[str, Any]) -> AsyncIterator[str]:
    async for chunk in await litellm.acompletion(**request(job)):
        yield chunk.choices[0].delta.content or ""


async def unguarded_sync(job: dict[str, Any]) -> AsyncIterator[str]:
    for chunk in litellm.completion(**request(job)):
        yield chunk.choices[0].delta.content or ""


async def guarded(job: dict[str, Any]) -> AsyncIterator[str]:
    async for outcome in await guard(job["base_url"], job["kind"])(**request(job)):
        yield outcome.validated_output or ""


async def guarded_sync(job: dict[str, Any]) -> AsyncIterator[str]:
    for outcome in guard(job["base_url"], job["kind"])(**request(job)):
        yield outcome.validated_output or ""


if __name__ == "__main__":
    main(
        {
            "unguarded": unguarded_sync,
            "sync": guarded_sync,
            "sync-fix": guarded_sync,
            "async-unguarded": unguarded,
            "async": guarded,
        }
    )
