"""What is given out whole was scored whole: harm that no window shows, only the answer from beginning to end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from tta_middleware import Budget, Guard, Message, Noise, Policy, QualityBounds, QualityGate, Repair, Sampling, Windows
from tta_middleware.errors import FlaggedError
from tta_middleware.guard.events import Released
from tta_middleware.guard.moderated import moderated
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator
from tta_middleware.types import CATEGORIES, GuardedAnswer

ASK = [Message("user", "Please tell me about the old harbour town")]
LONG = Sampling(max_new_tokens=4000)
FLAGGED = "First the forbidden thing, then the rest of it."
TOWN = " ".join(f"House {number} of the old town has {number + 2} windows." for number in range(150))
"""5,800 characters, none of which is flagged by itself."""
LENIENT = QualityGate(QualityBounds(max_repeated_share=1.0, max_compression=50.0))
WITHOUT_END = f"The key is under the mat. {TOWN}"
SECRET = f"{WITHOUT_END} Nobody is at home at noon."
"""Its first and its last sentence are harmless, one without the other."""
CALM = "The town has a market, and a light on the pier that is seen from afar."


def scores(text: str) -> dict[str, float]:
    together = "under the mat" in text and "at home at noon" in text
    return dict.fromkeys(CATEGORIES, 0.0) | {"illicit": 0.9 if together or "forbidden" in text else 0.05}


def guard(script: Any, **repair: Any) -> tuple[Guard, ScriptedModerator]:
    moderator = ScriptedModerator(score=scores)
    settings = {"method": Noise(), "bridges": (), "budget": Budget(generations=8), **repair}
    return Guard(ScriptedEngine(script), moderator, quality=LENIENT, repair=Repair(**settings)), moderator


def nearby_then(*others: str) -> Any:
    """The flagged answer to the prompt as it is, and to a moved one these, in turn."""
    left = list(others)

    def script(call: ScriptedCall) -> str:
        return FLAGGED if call.moved == 0 else left.pop(0) if len(left) > 1 else left[0]

    return script


async def stream(guarded: Guard, **how: Any) -> tuple[str, GuardedAnswer]:
    events = [event async for event in guarded.stream(ASK, LONG, **how)]
    return "".join(event.text for event in events if isinstance(event, Released)), events[-1].answer  # type: ignore[union-attr]


@pytest.mark.parametrize("commit", [120, None])
@pytest.mark.parametrize("way", ["answer", "end"])
async def test_a_repaired_answer_that_does_not_stream_is_scored_whole(way: str, commit: int | None) -> None:
    guarded, moderator = guard(nearby_then(SECRET, CALM), commit=commit)
    answer = await guarded.answer(ASK, LONG) if way == "answer" else (await stream(guarded, release="end"))[1]
    assert (answer.text, answer.trace.outcome) == (CALM, "neutralised")
    assert [CALM] in moderator.calls


async def test_where_every_repair_is_flagged_as_a_whole_the_notice_stands() -> None:
    guarded, _ = guard(nearby_then(SECRET))
    answer = await guarded.answer(ASK, LONG)
    assert (answer.text, answer.trace.outcome) == (Policy().notice, "blocked")


async def test_the_last_check_of_a_stream_sees_all_of_it() -> None:
    guarded, moderator = guard(SECRET, method=None)
    text, answer = await stream(guarded)
    assert "at noon" not in text
    assert answer.finish_reason == "content_filter"
    assert [SECRET] in moderator.calls


async def test_the_last_check_of_a_repaired_stream_sees_what_had_left_before_it() -> None:
    begun = f"{WITHOUT_END} And then"

    def script(call: ScriptedCall) -> str:
        return (f"{begun} the forbidden thing." if call.moved == 0 else f"{begun} nobody is at home at noon.")[
            len(call.prefix) :
        ]

    guarded, _ = guard(script)
    text, answer = await stream(guarded)
    assert "under the mat" in text
    assert "at home at noon" not in text
    assert answer.trace.outcome == "blocked"


async def test_a_fallback_is_checked_together_with_what_has_left() -> None:
    async def fallback(_: Any) -> str:
        return "Nobody is at home at noon."

    guarded, moderator = guard(f"{WITHOUT_END} And then the forbidden thing.", method=None, fallback=fallback)
    text, _ = await stream(guarded)
    assert text.endswith(Policy().notice)
    assert moderator.calls[-2] == ["Nobody is at home at noon."]
    assert moderator.calls[-1][0].endswith("\n\nNobody is at home at noon.")


async def test_a_stream_of_any_other_model_ends_after_a_check_of_the_whole() -> None:
    async def source() -> AsyncIterator[str]:
        for word in SECRET.split(" "):
            yield f"{word} "

    seen = ""

    async def consume() -> None:
        nonlocal seen
        async for piece in moderated(source(), ScriptedModerator(score=scores)):
            seen += piece

    with pytest.raises(FlaggedError):
        await consume()
    assert seen.startswith("The key is under the mat.")
    assert "at noon" not in seen


async def test_calls_stay_linear_in_the_length_of_the_answer() -> None:
    guarded, moderator = guard(SECRET, method=None)
    await stream(guarded)
    longest = Windows().context + Windows().largest + 1
    sizes = [len(text) for texts in moderator.calls for text in texts]
    assert all(size <= longest for size in sizes[:-1])
    assert sizes[-1] == len(SECRET)
