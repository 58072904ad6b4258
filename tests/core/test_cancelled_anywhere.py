"""Whoever is cancelled is cancelled, wherever that meets it: no error, no verdict and no answer comes in its place."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable

import anyio
import anyio.lowlevel
import pytest

from tta_middleware import Guard, Message, Noise, Repair, Windows
from tta_middleware.guard.moderated import moderated
from tta_middleware.moderation.adapters.runnable import RunnableModerator
from tta_middleware.moderation.ensemble import Ensemble
from tta_middleware.moderation.hedge import Hedged, HedgeSettings
from tta_middleware.moderation.retry import Retrying
from tta_middleware.policy.verdicts import verdicts_on
from tta_middleware.testing.delays import Unequal, slow_even, turns
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging

START = "The old harbour town lies where the river meets the sea. Its market opens at dawn."
HARM = f"{START} Then you do the forbidden thing in four steps and tell nobody about it at all."
SAFE = " Visitors like the lighthouse, the fish stalls and the quiet path along the dunes best."
ASK = [Message("user", "Please tell me about the old harbour town")]
WINDOWS = Windows(first=20, largest=40)


def late(call: ScriptedCall) -> str:
    return HARM[len(call.prefix) :] if call.moved < 0.6 else SAFE if call.prefix else START + SAFE


def guard() -> Guard:
    judge = Unequal(ScriptedModerator(score=flagging("forbidden")), slow_even)
    return Guard(ScriptedEngine(late), judge, repair=Repair(method=Noise(), commit=30), windows=WINDOWS)


def hedged() -> Hedged:
    async def score(text: str) -> float:
        await turns(4)
        return 0.1

    made = Hedged(RunnableModerator(score), HedgeSettings(minimum_samples=1))
    made._latencies.add(0.0)  # so that every call is hedged at once
    return made


async def answer() -> None:
    await guard().answer(ASK)


async def stream() -> None:
    async for _ in guard().stream(ASK):
        pass


async def another_models() -> None:
    async def source() -> AsyncGenerator[str, None]:
        for word in (START + SAFE).split(" "):
            await anyio.lowlevel.checkpoint()
            yield f"{word} "

    async for _ in moderated(source(), Unequal(ScriptedModerator(), slow_even), windows=WINDOWS):
        pass


async def verdicts() -> None:
    await verdicts_on(Retrying(Ensemble([hedged(), Ensemble([hedged(), hedged()])])), ["one", "two", "three"])


@pytest.mark.parametrize("how", ["task", "scope"])
@pytest.mark.parametrize(("work", "apart"), [(answer, 11), (stream, 11), (another_models, 5), (verdicts, 1)])
async def test_a_cancellation_is_one_at_any_moment(work: Callable[[], Awaitable[None]], apart: int, how: str) -> None:
    async def in_scope() -> None:
        with scope:
            await work()

    moment = ended = 0
    while True:
        scope = anyio.CancelScope()
        task = asyncio.ensure_future(work() if how == "task" else in_scope())
        for _ in range(moment):
            await asyncio.sleep(0)
        if task.done():
            break
        task.cancel() if how == "task" else scope.cancel()
        await asyncio.wait([task])
        ended += 1
        moment += apart
        if how == "task":
            assert task.cancelled(), moment
        else:
            task.result()
    assert ended > 5
