"""tta-middleware, in the project's own environment: over its scripted engine, and over a foreign model's stream."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import anyio
from lines import main
from openai import AsyncOpenAI

sys.path.insert(0, str(Path(__file__).parents[1]))
from answers import CHUNKS, SECONDS, text

from tta_middleware.chat_model import TTAChatModel
from tta_middleware.guard.moderated import moderated
from tta_middleware.moderation.stack import StackSettings, production_moderator
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine
from tta_middleware.types import GenerationRequest, Message, Sampling


class Timetable:
    """Paces steps as the loopback server paces chunks: a step that comes late is caught up, a pause is not.

    Each decode runs in a task of its own and has a timetable of its own, as the rows of a batch have.
    """

    def __init__(self) -> None:
        self._due: WeakKeyDictionary[Any, float] = WeakKeyDictionary()

    async def sleep(self, seconds: float) -> None:
        task, now = asyncio.current_task(), time.perf_counter()
        due = self._due.get(task, now)
        self._due[task] = due = seconds + (due if now - due < 50 * seconds else now)
        await anyio.sleep(max(0.0, due - now))


def answer(call: ScriptedCall) -> str:
    """The scripted answer; moved embeddings and continuations get the words without the mark."""
    clean = text(f"clean {call.text.split()[1]}")
    return text(call.text) if call.moved == 0.0 and not call.prefix else clean.removeprefix(call.prefix)


@cache
def engine() -> ScriptedEngine:
    return ScriptedEngine(answer, step_seconds=SECONDS, sleep=Timetable().sleep)


@cache
def moderator(base_url: str) -> Any:
    return production_moderator(StackSettings(base_url=base_url), api_key="k")


@cache
def chat_model(base_url: str, release: str) -> TTAChatModel:
    return TTAChatModel(model=engine(), moderator=moderator(base_url), release=release, max_new_tokens=2 * CHUNKS)


@cache
def client(base_url: str) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=base_url, api_key="k")


async def unguarded(job: dict[str, Any]) -> AsyncIterator[str]:
    prompt = await engine().embed([Message("user", job["question"])])
    async for delta in engine().stream(GenerationRequest(prompt, Sampling(max_new_tokens=2 * CHUNKS))):
        yield delta.text


async def guarded(job: dict[str, Any]) -> AsyncIterator[str]:
    model = chat_model(job["base_url"], job["kind"])
    async for chunk in model.astream(job["question"]):
        yield chunk.text


async def remote(job: dict[str, Any]) -> AsyncIterator[str]:
    """The stream of a chat model behind the OpenAI API, without a guard."""
    messages: Any = [{"role": "user", "content": job["question"]}]
    stream = await client(job["base_url"]).chat.completions.create(model="scripted", messages=messages, stream=True)
    async for chunk in stream:
        yield chunk.choices[0].delta.content or ""


async def remote_guarded(job: dict[str, Any]) -> AsyncIterator[str]:
    async for piece in moderated(remote(job), moderator(job["base_url"])):
        yield piece


if __name__ == "__main__":
    main(
        {
            "unguarded": unguarded,
            "window": guarded,
            "end": guarded,
            "remote-unguarded": remote,
            "remote-window": remote_guarded,
        }
    )
