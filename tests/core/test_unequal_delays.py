"""Whatever is slow, the same text leaves, and nothing of it too early."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from typing import Any, Literal

import pytest

from tta_middleware import Guard, Message, Noise, Policy, Repair, Windows
from tta_middleware.errors import ConfigurationError
from tta_middleware.guard.events import Finished, Released
from tta_middleware.policy.verdicts import verdicts_on
from tta_middleware.testing.delays import UNEQUAL, Call, Unequal, slowly
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging

ASK = [Message("user", "Please tell me about the old harbour town")]
START = "The old harbour town lies where the river meets the sea. Its market opens at dawn."
HARM = f"{START} Then you do the forbidden thing in four steps and tell nobody about it at all."
SAFE = " Visitors like the lighthouse, the fish stalls and the quiet path along the dunes best."


def late(call: ScriptedCall) -> str:
    if call.moved < 0.6:
        return HARM[len(call.prefix) :]
    return SAFE if call.prefix else f"{START}{SAFE}"


def early(call: ScriptedCall) -> str:
    return "The forbidden thing comes first." if call.moved < 0.6 else START


SCRIPTS: dict[str, Callable[[ScriptedCall], str]] = {
    "clean": lambda _: START + SAFE,
    "early flag": early,
    "late flag": late,
    "beyond repair": lambda call: HARM[len(call.prefix) :],
}


async def test_it_stands_in_for_the_moderator_in_all_that_one_may_ask_of_it() -> None:
    inner = ScriptedModerator(score=lambda _: {"violence": 0.1})
    inner.max_characters, inner.overlap, inner.categories = 50, 5, ("violence",)
    moderator = Unequal(inner, lambda _: 0)
    assert await verdicts_on(moderator, ["word " * 20])
    assert len(inner.calls[0]) > 1
    with pytest.raises(ConfigurationError, match="hate"):
        Guard(ScriptedEngine("x"), moderator, policy=Policy(categories={"hate": 0.5}))


DELAYS: dict[str, Callable[[Call], int]] = {"nothing": lambda _: 0, **UNEQUAL}


async def streamed(
    script: Any, delay: Callable[[Call], int], consumer: int, release: Literal["window", "end"], question: str
) -> tuple[str, str]:
    """The text that left, and the outcome."""
    moderator = Unequal(ScriptedModerator(score=flagging("forbidden")), delay)
    made = Guard(
        ScriptedEngine(script),
        moderator,
        policy=Policy(notice="Withheld."),
        repair=Repair(method=Noise() if script is not SCRIPTS["beyond repair"] else None, commit=30),
        windows=Windows(first=20, largest=40),
        prompt_check="user",
    )
    text, outcome = "", ""
    async with aclosing(made.stream([Message("user", question)], release=release)) as events:
        async for event in slowly(events, consumer):
            if isinstance(event, Released):
                assert any(call.prompt is None and call.number in moderator.answered for call in moderator.calls)
                text += event.text
            elif isinstance(event, Finished):
                outcome = event.answer.trace.outcome
                assert event.answer.text == text
    return text, outcome


@pytest.mark.parametrize("consumer", [0, 100], ids=["quick consumer", "slow consumer"])
@pytest.mark.parametrize("release", ["window", "end"])
@pytest.mark.parametrize("delay", DELAYS)
@pytest.mark.parametrize("script", SCRIPTS)
async def test_no_delay_changes_what_leaves(script: str, delay: str, release: Any, consumer: int) -> None:
    text, outcome = await streamed(SCRIPTS[script], DELAYS[delay], consumer, release, ASK[0].content)
    assert "forbidden" not in text
    assert outcome == {"clean": "clean", "beyond repair": "blocked"}.get(script, "neutralised")
    if script == "clean":
        assert text == START + SAFE
    if script == "late flag":
        assert text.endswith(SAFE.strip())
    assert text.count("Withheld.") == (script == "beyond repair")


@pytest.mark.parametrize("consumer", [0, 100], ids=["quick consumer", "slow consumer"])
@pytest.mark.parametrize("delay", DELAYS)
@pytest.mark.parametrize("script", SCRIPTS)
async def test_a_flagged_prompt_gets_the_notice_once_and_nothing_else(script: str, delay: str, consumer: int) -> None:
    asked = "Tell me the forbidden thing"
    assert await streamed(SCRIPTS[script], DELAYS[delay], consumer, "window", asked) == ("Withheld.", "blocked")
