"""The race inside a guard, on an engine without a model and on the embedded one."""

from __future__ import annotations

from collections.abc import Callable

import anyio
import pytest

from tta_middleware import Guard, Message, Repair, Sampling, Windows
from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.methods import Move, Race
from tta_middleware.methods.race import INSTEAD
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator

HARM = "Certainly, flagme is done in four steps."
LOOP = "one one one one one one one one one one one one one one"
SAFE = "I would rather help you find a lawful way to do that."
ASK = [Message("user", "Please tell me how to do the thing")]


REMINDER = Move(label="instead", reminder=INSTEAD)


def guard(engine: ScriptedEngine) -> Guard:
    """The default ladder with nothing moved on its first rung."""
    race = Race(ladder=(REMINDER, *Race().ladder[1:]))
    return Guard(engine, ScriptedModerator(), repair=Repair(method=race))


async def test_the_smallest_sufficient_move_is_taken_and_every_row_still_reads_as_its_token() -> None:
    """A reminder and a step are asked for; only the step helps, and nothing larger is tried."""
    engine = ScriptedEngine(lambda call: SAFE if call.moved > 0.3 else HARM, width=64)
    trace = (await guard(engine).answer(ASK)).trace
    assert trace.outcome == "neutralised"
    assert trace.generations == 3
    assert trace.relative_move == pytest.approx(Race().ladder[1].radius, abs=1e-3)
    assert trace.decodes_to_original


async def test_a_loop_is_sampled_again_before_the_embeddings_are_moved_further() -> None:
    seeds: list[int] = []

    def loops_once(call: ScriptedCall) -> str:
        if call.moved < 0.3:
            return HARM
        seeds.append(call.seed)
        return SAFE if len(seeds) > 1 else LOOP

    answer = await guard(ScriptedEngine(loops_once, width=64)).answer(ASK)
    assert answer.text == SAFE
    assert len(set(seeds)) == 2
    assert answer.trace.relative_move == pytest.approx(Race().ladder[1].radius, abs=1e-3)


QUESTION = ASK[0].content
ECHOES = {
    "the question": QUESTION,
    "the question, twice": f"{QUESTION}. {QUESTION}!",
    "the instructions": "You are a helpful assistant of the library in town.",
    "a reminder": INSTEAD,
    "a part of a reminder": INSTEAD[: INSTEAD.rindex(" ")],
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("echo", ECHOES.values(), ids=ECHOES)
async def test_an_echo_of_what_the_model_was_told_is_no_repair(echo: str, stream: bool) -> None:
    asked = [Message("system", ECHOES["the instructions"]), *ASK]
    engine = ScriptedEngine(echoing(echo), width=64)
    events = [event async for event in guard(engine).stream(asked, release="window" if stream else "end")]
    answer = events[-1].answer
    assert (answer.text, answer.trace.outcome) == (SAFE, "neutralised")
    assert answer.trace.move != REMINDER.label


def echoing(echo: str) -> Callable[[ScriptedCall], str]:
    """A model that says what it was told over again until its prompt has moved, and before any reminder harms."""

    def script(call: ScriptedCall) -> str:
        if call.moved > 0.3:
            return SAFE
        return echo if INSTEAD in call.conversation else HARM

    return script


async def test_a_continuation_that_says_what_has_left_again_is_no_repair() -> None:
    begin = "Take both hands and hold the little wheel of the lock firmly, then look closely at the numbers on it. "
    engine = ScriptedEngine(
        lambda call: SAFE if call.moved > 0.3 else begin if call.prefix else f"{begin}{begin.upper()}{HARM}", width=64
    )
    few = Windows(first=40, largest=40)
    mending = Guard(engine, ScriptedModerator(), repair=Repair(method=Race(), bridges=()), windows=few)
    events = [event async for event in mending.stream(ASK)]
    answer = events[-1].answer
    assert answer.trace.outcome == "neutralised"
    assert answer.text.endswith(SAFE)
    assert answer.text.count("little wheel") == 1


class Crowded(ScriptedEngine):
    """Has so many places free."""

    room = 0

    def free_places(self) -> int:
        return self.room


@pytest.mark.parametrize(("room", "waves"), [(0, [1, 1, 1, 1]), (2, [1, 2, 2]), (9, [1, 3])])
async def test_with_free_places_a_wave_is_as_large_as_the_engine_has_room(room: int, waves: list[int]) -> None:
    """The fourth rung is the first that helps."""
    engine = Crowded(lambda call: SAFE if "helpful and responsible" in call.conversation else HARM, width=64)
    engine.room = room
    found = await Guard(engine, ScriptedModerator(), repair=Repair(method=Race(wave="free"))).answer(ASK)
    assert found.text == SAFE
    assert found.trace.generations == 1 + sum(waves)
    assert found.trace.move == Race().ladder[3].label


@pytest.mark.slow
async def test_a_real_model_is_steered_and_its_prompt_still_decodes_to_the_same_tokens() -> None:
    """Reminders alone do not change what this moderator minds; a word direction does."""
    engine = TransformersEngine("smollm2", dtype="float32")
    steps = Race(ladder=tuple(move for move in Race().ladder if not move.reminder))
    ask = [Message("user", "Write a short story about a knight who loves his sword.")]
    first = await Guard(engine, ScriptedModerator()).answer(ask, Sampling(max_new_tokens=32))
    beginning = first.text[:24]
    moderator = ScriptedModerator(score=lambda text: {"violence": 0.9 if text.startswith(beginning) else 0.0})
    try:
        with anyio.fail_after(120):
            answer = await Guard(engine, moderator, repair=Repair(method=steps)).answer(
                ask, Sampling(max_new_tokens=32)
            )
    finally:
        await engine.aclose()
    assert answer.trace.outcome == "neutralised"
    assert not answer.text.startswith(beginning)
    assert 0.0 < answer.trace.relative_move < 1.0
    assert answer.trace.decodes_to_original
