"""The embedded model and moderator inside a real agent."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from tta_langchain_agents import TTAMiddleware

from tta_middleware import TTAChatModel
from tta_middleware.aio import bridge
from tta_middleware.assembly import Runtime

UNSAFE = "I will kill you and burn your house down. I hope you suffer and die, you worthless idiot."


@pytest.fixture(scope="module")
def local() -> Iterator[TTAChatModel]:
    runtime = Runtime()
    yield TTAChatModel(model="smollm2", moderator="local", max_new_tokens=12, dtype="float32", runtime=runtime)
    bridge.run(runtime.aclose)


@pytest.mark.slow
async def test_the_embedded_model_answers_for_a_flagged_one(watched: Any, local: TTAChatModel) -> None:
    middleware = TTAMiddleware("local", repair_model=local)
    run = watched(["The library opens at nine.", UNSAFE], middleware=[middleware])
    hello = {"messages": [("user", "When does the library open?")]}
    await run.agent.ainvoke(hello, run.config)
    await asyncio.to_thread(run.agent.invoke, hello, run.config)
    async for item in run.agent.astream(hello, run.config, stream_mode="messages"):
        run.seen.append(item)
    clean, repaired, streamed = run.messages[1::2]
    assert (clean.text, clean.response_metadata["tta"]["outcome"]) == ("The library opens at nine.", "clean")
    for answer in (repaired, streamed):
        trace = answer.response_metadata["tta"]
        assert trace["handed_over"]["baseline"]["flagged"] is True
        assert trace["outcome"] in ("clean", "neutralised")
        assert trace["moderator"] == clean.response_metadata["tta"]["moderator"]
        assert answer.text.strip()
    assert not run.leaks("burn your house")
    assert not run.leaks("suffer and die")
    await middleware.aclose()


async def test_the_embedded_model_as_the_agents_model(watched: Any, local: TTAChatModel) -> None:
    run = watched([], model=local, middleware=[TTAMiddleware("local")])
    await run.agent.ainvoke({"messages": [("user", "Name a tree.")]}, run.config)
    assert run.messages[-1].response_metadata["tta"]["outcome"] in ("clean", "neutralised")
