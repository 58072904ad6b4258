"""An engine that breaks an answer off: a part never passes for the whole."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any, Literal, NoReturn

import pytest

from tta_middleware import Budget, Guard, Message, Noise, Repair, TTAChatModel, Windows
from tta_middleware.errors import EngineError
from tta_middleware.guard.events import Released
from tta_middleware.guard.moderated import moderated
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging
from tta_middleware.types import GenerationRequest, TextDelta

ASK = [Message("user", "Please tell me about the old harbour town")]
CALM = "Visitors like the lighthouse, the fish stalls and the quiet path along the dunes best of all."
HARM = "Forbidden things come first, then the rest of it."
Ending = Literal["aborted", "silence"]


class Breaks(ScriptedEngine):
    """Ends a stream that says ``CALM`` after sixty letters: by the reason ``aborted``, or without a word."""

    ending: Ending = "aborted"

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[TextDelta, None]:
        said = ""
        async for delta in super().stream(request):
            said += delta.text
            if said.startswith(CALM[:60]):
                if self.ending == "aborted":
                    yield TextDelta("", (), "aborted")
                return
            yield delta


def guard(script: str | Callable[[ScriptedCall], str], ending: Ending) -> Guard:
    engine = Breaks(script)
    engine.ending = ending
    moderator = ScriptedModerator(score=flagging("forbidden"))
    repair = Repair(method=Noise(), budget=Budget(generations=5), commit=30)
    return Guard(engine, moderator, repair=repair, windows=Windows(first=20, largest=40))


def repaired(call: ScriptedCall) -> str:
    return HARM if call.moved < 0.6 else CALM


@pytest.mark.parametrize("ending", ["aborted", "silence"])
@pytest.mark.parametrize("script", [CALM, repaired], ids=["first", "repaired"])
class TestBrokenOff:
    async def test_an_answer_raises(self, script: Any, ending: Ending) -> None:
        with pytest.raises(EngineError, match="broke the answer off"):
            await guard(script, ending).answer(ASK)

    @pytest.mark.parametrize("release", ["window", "end"])
    async def test_a_stream_raises_after_what_was_checked(self, script: Any, ending: Ending, release: Any) -> None:
        seen = ""

        async def consume() -> None:
            nonlocal seen
            async for event in guard(script, ending).stream(ASK, release=release):
                if isinstance(event, Released):
                    seen += event.text

        with pytest.raises(EngineError, match="broke the answer off"):
            await consume()
        assert CALM.startswith(seen)
        assert bool(seen) == (release == "window")


async def test_langchain_users_get_an_error_and_may_ask_again() -> None:
    engine = Breaks(CALM)
    model = TTAChatModel(model=engine, moderator=ScriptedModerator(score=flagging("forbidden")))
    with pytest.raises(EngineError):
        await model.ainvoke("Please tell me about the old harbour town")

    engine.script = "It is a quiet place by the sea."
    assert (await model.ainvoke("And now?")).content == engine.script


async def cancelled_within(*_: Any, **__: Any) -> NoReturn:
    """What it waits for was cancelled, and not whoever waits for it."""
    ended = asyncio.get_running_loop().create_future()
    ended.cancel()
    await ended
    raise AssertionError


async def all_of(stream: AsyncGenerator[Any, None]) -> list[Any]:
    return [piece async for piece in stream]


@pytest.mark.parametrize("surface", ["answer", "stream"])
@pytest.mark.parametrize("part", ["load", "embed", "mean_nll", "nearest_tokens", "fallback"])
async def test_a_cancellation_from_within_is_an_error_and_not_the_callers(part: str, surface: str) -> None:
    engine = ScriptedEngine(repaired if part != "fallback" else HARM)
    fallback: Any = cancelled_within if part == "fallback" else "refuse"
    if part != "fallback":
        setattr(engine, part, cancelled_within)
    repair = Repair(method=Noise() if part != "fallback" else None, fallback=fallback)
    made = Guard(engine, ScriptedModerator(score=flagging("forbidden")), repair=repair)
    with pytest.raises(EngineError, match="from within"):
        await (made.answer(ASK) if surface == "answer" else all_of(made.stream(ASK)))


async def test_a_source_that_is_cancelled_from_within_has_not_ended() -> None:
    async def source() -> AsyncGenerator[str, None]:
        yield CALM
        await cancelled_within()

    with pytest.raises(EngineError, match="from within"):
        await all_of(moderated(source(), ScriptedModerator()))
