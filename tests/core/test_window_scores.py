"""The trace's windows: what was scored of an answer, where, and what was held back."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from tta_middleware import Finished, Guard, Message, Noise, Policy, Repair, Trace, Windows
from tta_middleware.aio import bridge
from tta_middleware.errors import ModerationUnavailableError
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging

ASK = [Message("user", "Tell me about the old harbour")]
START = "The old harbour lies where the river meets the sea, and its market opens at dawn."
HARM = f"{START} Then comes the forbidden part of the story, which goes on for a good while."
SAFE = " Visitors like the lighthouse, the stalls and the quiet path along the dunes."
WINDOWS = Windows(first=20, largest=40)


def harbour(call: ScriptedCall) -> str:
    if not call.prefix:
        return HARM
    return SAFE if call.moved > 0.1 else HARM.removeprefix(call.prefix)


async def traced(guard: Guard, *, held: bool = False) -> tuple[str, Trace]:
    async for event in guard.stream(ASK, release="end" if held else "window"):
        if isinstance(event, Finished):
            return event.answer.text, event.answer.trace
    raise AssertionError("the stream did not finish")


def guard_over(script: object = HARM, *, moderator: ScriptedModerator | None = None, **more: object) -> Guard:
    scorer = moderator or ScriptedModerator(score=flagging("forbidden"))
    repair = Repair(method=Noise(), bridges=(), commit=None)
    return Guard(ScriptedEngine(script), scorer, repair=repair, windows=WINDOWS, **more)


async def test_a_clean_answer_has_a_score_per_window_up_to_its_end() -> None:
    text, trace = await traced(guard_over(START))
    assert [window.end for window in trace.windows] == [20, 60, len(START)]
    assert {(window.score, window.category, window.limit) for window in trace.windows} == {(0.05, "illicit", 0.5)}
    assert not any(window.flagged for window in trace.windows)
    assert trace.windows[-1].released == len(text) == len(START)


async def test_a_late_flag_says_where_it_was_and_how_far_the_text_had_left() -> None:
    text, trace = await traced(guard_over(harbour))
    own = [window for window in trace.windows if window.repair == 0]
    chosen = [window for window in trace.windows if window.repair == 1]
    assert [window.flagged for window in own] == [False, False, False, True]
    assert own[-1].released == trace.seam < HARM.index("forbidden") <= own[-1].end
    assert own[-1].score == 0.9
    assert chosen[0].limit == 0.5 * 0.7  # a repair has to clear its margin
    assert chosen[0].end > trace.seam
    assert chosen[-1].end == chosen[-1].released == len(text)
    assert "orbidden" not in json.dumps(trace.as_dict())


async def test_an_answer_that_is_held_has_one_window() -> None:
    text, trace = await traced(guard_over(START), held=True)
    [window] = trace.windows
    assert (window.end, window.released) == (len(text), len(text))


async def test_a_window_without_a_verdict_has_no_score() -> None:
    down = ScriptedModerator(failures=[None, ModerationUnavailableError("down", cause="connection")])
    _, trace = await traced(guard_over(START, moderator=down))
    assert [window.score is None for window in trace.windows] == [False, True]
    assert trace.outcome == "blocked"
    assert trace.windows[-1].released < trace.windows[-1].end


async def test_a_categorys_own_threshold_is_its_limit() -> None:
    _, trace = await traced(guard_over(START, policy=Policy(threshold=0.9, categories={"illicit": 0.2})))
    assert {window.limit for window in trace.windows} == {0.2}


@settings(max_examples=20)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 70))
def test_positions_ascend_and_nothing_leaves_ahead_of_its_window(first: int, more: int, at: int) -> None:
    answer = f"{SAFE.strip()[:at]} forbidden {SAFE}" if at else SAFE
    guard = Guard(
        ScriptedEngine(answer),
        ScriptedModerator(score=flagging("forbidden")),
        repair=Repair(method=None),
        windows=Windows(first=first, largest=first + more),
    )
    _, trace = bridge.run(lambda: traced(guard))
    ends, out = [window.end for window in trace.windows], [window.released for window in trace.windows]
    assert ends == sorted(ends)
    assert out == sorted(out)
    assert all(window.released <= window.end for window in trace.windows)
    assert [window.flagged for window in trace.windows].count(True) == (trace.outcome == "blocked")
