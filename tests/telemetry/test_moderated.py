"""What is told of a stream that ``moderated`` checks: the same as of a guard's answer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
from memory import HARM, SAFE, START, Memory
from test_metrics import counted

from tta_middleware import Policy, Windows
from tta_middleware.errors import FlaggedError, ModerationUnavailableError
from tta_middleware.guard.moderated import Thoughts, moderated
from tta_middleware.telemetry import format as names
from tta_middleware.telemetry import instrument, uninstrument
from tta_middleware.testing.delays import Unequal, slow_even
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging
from tta_middleware.types import TextDelta

WINDOWS = Windows(first=20, largest=40)


async def said(text: str, thought: str = "", token: int = 1) -> AsyncIterator[str | TextDelta]:
    for word in thought.split(" ") if thought else ():
        yield TextDelta(f"{word} ", (token,), channel="reasoning")
    for word in text.split(" "):
        yield TextDelta(f"{word} ", (token,))


async def checked(source: Any, most: int = 10_000, **settings: Any) -> str:
    """The first pieces of a stream, joined."""
    moderator = settings.pop("moderator", None) or Unequal(ScriptedModerator(score=flagging("forbidden")), slow_even)
    found = ""
    async with aclosing(moderated(source, moderator, **{"windows": WINDOWS, **settings})) as pieces:
        async for piece in pieces:
            found, most = found + piece, most - 1
            if not most:
                break
    return found


async def test_a_stream_is_one_tree(memory: Memory) -> None:
    tracer, windows = memory.tracers.get_tracer("test"), list[Any]()
    with tracer.start_as_current_span("user") as user:
        assert (await checked(said(SAFE), model="far", scored=windows, prompt="my secretword")).strip() == SAFE
    [answer], checks = memory.named("chat"), memory.named("moderate ")
    assert answer.name == "chat far"
    assert answer.parent is not None
    assert answer.parent.span_id == user.get_span_context().span_id
    assert {check.parent.span_id for check in checks if check.parent} == {answer.context.span_id}
    ends = sorted((event.attributes or {})["tta.window.end"] for event in answer.events)
    assert ends == sorted(window.end for window in windows)
    about = memory.answer()
    expected = {
        "gen_ai.provider.name": "unknown",
        "gen_ai.request.model": "far",
        "gen_ai.request.stream": True,
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.output_tokens": len(SAFE.split(" ")),
        "tta.method": "none",
        "tta.outcome": "clean",
        "tta.moderation_calls": len(checks),
    }
    assert {name: about.get(name) for name in expected} == expected
    assert about["gen_ai.response.time_to_first_chunk"] > 0
    assert "gen_ai.usage.input_tokens" not in about
    for word in ("secretword", "harbour"):
        assert word not in memory.everything()


@pytest.mark.parametrize("hold", [False, True])
async def test_a_block_is_an_answer(memory: Memory, hold: bool) -> None:
    with pytest.raises(FlaggedError):
        await checked(said(HARM), hold=hold)
    about = memory.answer()
    assert (about["tta.outcome"], about["gen_ai.response.finish_reasons"]) == ("blocked", ("content_filter",))
    assert (about["tta.first.flagged"], about["gen_ai.request.stream"]) == (True, not hold)
    assert ("gen_ai.response.time_to_first_chunk" in about) == (not hold)
    assert "error.type" not in about
    assert memory.named("chat")[0].name == "chat"
    assert counted(memory, names.FLAGGED, names.STAGE, names.CATEGORY) == {("output", "illicit"): 1}
    assert "forbidden" not in memory.everything()


async def test_a_flagged_thought_has_its_stage(memory: Memory) -> None:
    async def shown(_: str) -> None: ...

    moderator = ScriptedModerator(score=flagging("forbidden"))
    thoughts = Thoughts(moderator, Policy(), shown)
    await checked(said(SAFE, thought="The harbour."), moderator=moderator, thoughts=thoughts)
    assert memory.answer()["tta.reasoning.tokens"] == 2
    memory.spans.clear()
    with pytest.raises(FlaggedError):
        await checked(said(SAFE, thought="Something forbidden."), moderator=moderator, thoughts=thoughts)
    assert memory.answer()["tta.stop_reason"] == "flagged: reasoning"
    assert counted(memory, names.FLAGGED, names.STAGE) == {("reasoning",): 1}


@pytest.mark.parametrize(("on_error", "outcome"), [("closed", "blocked"), ("open", "unchecked")])
async def test_without_a_verdict(memory: Memory, on_error: Any, outcome: str) -> None:
    away = ScriptedModerator(failures=[ModerationUnavailableError("away", cause="timeout")] * 9)
    settings = {"moderator": away, "policy": Policy(threshold=0.5, on_error=on_error)}
    if on_error == "closed":
        with pytest.raises(ModerationUnavailableError):
            await checked(said(SAFE), **settings)
    else:
        assert (await checked(said(SAFE), **settings)).strip() == SAFE
    assert memory.answer()["tta.outcome"] == outcome
    assert memory.answer()["tta.stop_reason"].startswith("moderator: ModerationUnavailableError")


async def test_what_would_have_been_withheld(memory: Memory) -> None:
    assert "forbidden" in await checked(said(HARM), policy=Policy(threshold=0.5, mode="observe"))
    about = memory.answer()
    assert (about["tta.outcome"], about["tta.mode"], about["tta.observed"]) == (
        "clean",
        "observe",
        ("output: illicit",),
    )
    assert counted(memory, names.FLAGGED, names.MODE) == {("observe",): 1}


async def test_a_source_that_breaks_and_a_reader_that_leaves(memory: Memory) -> None:
    async def broken() -> AsyncIterator[str]:
        yield START
        raise OSError("secretword")

    with pytest.raises(OSError, match="secretword"):
        await checked(broken())
    assert memory.answer()["error.type"] == "OSError"
    assert "secretword" not in memory.everything()
    memory.spans.clear()
    await checked(said(SAFE), most=1)
    assert memory.answer()["error.type"] == "cancelled"


async def test_what_left_is_told_where_that_is_switched_on() -> None:
    told = Memory()
    instrument(capture_content=True, tracer_provider=told.tracers, meter_provider=told.meters)
    try:
        with pytest.raises(FlaggedError):
            await checked(said(HARM), prompt="my secretword")
    finally:
        uninstrument()
    about = told.answer()
    assert "secretword" in about["gen_ai.input.messages"]
    assert "harbour" in about["gen_ai.output.messages"]
    assert "forbidden" not in told.everything()
