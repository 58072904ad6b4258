"""Of several good candidates of a wave the one is given out that says most about the question."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tta_middleware import Guard, Message, Repair
from tta_middleware.guard.events import Finished, Released
from tta_middleware.guard.helpful import helpfulness
from tta_middleware.guard.settings import Preference
from tta_middleware.methods import Move, Race
from tta_middleware.testing.delays import UNEQUAL, Call, Unequal
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator

QUESTION = "How do I open the lock of my neighbour's garden shed?"
HARM = "Certainly, flagme is done in four steps and here they are."
REFUSAL = "I'm sorry, but I can't help with opening the lock of a garden shed that is not yours."
ASIDE = "There are many things to do on a sunny afternoon, such as reading a book by the river."
ABOUT = "Ask your neighbour whether the garden shed may be opened, or call a locksmith about the lock."


THREE = Race(
    wave=3,
    ladder=(
        Move(label="reminder", reminder="Be kind."),
        Move(label="step", words="safe", radius=0.5),
        Move(label="alternative", reminder="Offer an alternative."),
    ),
)


def tell(answers: dict[str, str]) -> ScriptedEngine:
    """An engine whose three rungs of the race give these answers."""

    def reply(call: ScriptedCall) -> str:
        if call.moved > 0.3:
            return answers["step"]
        if "alternative" in call.conversation:
            return answers["alternative"]
        return answers["reminder"] if "system" in call.conversation else HARM

    return ScriptedEngine(reply, width=64)


async def given_out(engine: ScriptedEngine, moderator: Unequal | ScriptedModerator, prefer: Preference) -> str:
    repair = Repair(method=THREE, prefer=prefer)
    text = ""
    async with aclosing(Guard(engine, moderator, repair=repair).stream([Message("user", QUESTION)])) as events:
        async for event in events:
            text += event.text if isinstance(event, Released) else ""
            if isinstance(event, Finished):
                assert event.answer.trace.outcome == "neutralised"
                assert event.answer.trace.generations == 4
    return text


@pytest.mark.parametrize("delay", [lambda _: 0, *UNEQUAL.values()])
async def test_what_says_most_about_the_question_leaves_and_refusals_come_last(delay: Callable[[Call], int]) -> None:
    engine = tell({"reminder": REFUSAL, "step": ASIDE, "alternative": ABOUT})
    assert await given_out(engine, Unequal(ScriptedModerator(), delay), "helpful") == ABOUT
    engine = tell({"reminder": REFUSAL, "step": ASIDE, "alternative": HARM})
    assert await given_out(engine, Unequal(ScriptedModerator(), delay), "helpful") == ASIDE


async def test_the_first_good_one_leaves_where_that_is_wanted() -> None:
    engine = tell({"reminder": REFUSAL, "step": ABOUT, "alternative": ABOUT})
    assert await given_out(engine, ScriptedModerator(), "first") == REFUSAL


async def test_a_refusal_leaves_where_nothing_else_is_good() -> None:
    engine = tell({"reminder": HARM, "step": REFUSAL, "alternative": "one " * 30})
    assert await given_out(engine, ScriptedModerator(), "helpful") == REFUSAL


@pytest.mark.parametrize("delay", UNEQUAL.values())
async def test_a_candidate_that_is_flagged_later_on_says_nothing_flagged(delay: Callable[[Call], int]) -> None:
    """The one that says most turns to harm behind its commit point."""
    turning = f"{ABOUT} {ASIDE} {ASIDE} {HARM}"
    text = await given_out_any(tell({"reminder": ASIDE, "step": turning, "alternative": REFUSAL}), delay)
    assert "flagme" not in text


async def given_out_any(engine: ScriptedEngine, delay: Callable[[Call], int]) -> str:
    guard = Guard(engine, Unequal(ScriptedModerator(), delay), repair=Repair(method=THREE))
    text = ""
    async with aclosing(guard.stream([Message("user", QUESTION)])) as events:
        async for event in events:
            text += event.text if isinstance(event, Released) else ""
    return text


@given(st.text(max_size=200), st.text(max_size=200))
def test_any_refusal_stands_below_any_other_answer(question: str, answer: str) -> None:
    willing, share = helpfulness(question, answer)
    assert 0.0 <= share <= 1.0
    assert not willing or (willing, share) > helpfulness(question, f"I'm sorry, but I can't help. {question}")


def test_other_endings_of_a_word_count_as_the_word() -> None:
    assert helpfulness("gardening", "gardens") == helpfulness("gardening", "gardening") == (True, 1.0)
    assert helpfulness("", "anything") == (True, 0.0)
