"""A repair that cannot be prepared as it should be: what cannot be tried is skipped; in the end stands the fallback."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from tta_middleware import Budget, Guard, Message, Policy, Race, Repair, Sampling, Windows
from tta_middleware.errors import ConfigurationError
from tta_middleware.guard.events import RepairFinished, RepairStarted
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging
from tta_middleware.types import GuardedAnswer, PromptEmbeddings

ASK = [Message("user", "Please tell me about the old harbour town")]
START = "The old harbour town lies where the river meets the sea. Its market opens at dawn."
HARM = f"{START} Then you do the forbidden thing in four steps and tell nobody about it at all."
CALM = " Visitors like the lighthouse, the fish stalls and the quiet path along the dunes best."


class Strict(ScriptedEngine):
    """Refuses prompts, as a chat template or a full context does."""

    refuses: Callable[[Sequence[Message], int], bool] = staticmethod(lambda turns, tokens: False)

    async def embed(
        self, messages: Sequence[Message], *, assistant_prefix: str = "", tools: Sequence[Mapping[str, Any]] = ()
    ) -> PromptEmbeddings:
        prompt = await super().embed(messages, assistant_prefix=assistant_prefix, tools=tools)
        if self.refuses(messages, len(prompt.token_ids)):
            raise ConfigurationError("refused")
        return prompt


def no_system(turns: Sequence[Message], tokens: int) -> bool:
    return any(turn.role == "system" for turn in turns)


def longer_than(most: int) -> Callable[[Sequence[Message], int], bool]:
    return lambda turns, tokens: tokens > most


WITHOUT_REMINDER = next(move.label for move in Race().ladder if not move.reminder)


def too_long_for_a_reminder(turns: Sequence[Message], tokens: int) -> bool:
    return no_system(turns, tokens) and tokens > 20


def moved_is_calm(call: ScriptedCall) -> str:
    return HARM[len(call.prefix) :] if call.moved < 0.1 else CALM


def guard(script: Any, refuses: Callable[[Sequence[Message], int], bool], **repair: Any) -> Guard:
    engine = Strict(script)
    engine.refuses = refuses
    settings = {"method": Race(sub_lexical=False), "commit": 30, "budget": Budget(generations=12), **repair}
    moderator = ScriptedModerator(score=flagging("forbidden"))
    return Guard(engine, moderator, repair=Repair(**settings), windows=Windows(first=20, largest=40))


async def answer_of(guarded: Guard, way: str) -> GuardedAnswer:
    if way == "answer":
        return await guarded.answer(ASK)
    *_, last = [event async for event in guarded.stream(ASK)]
    return last.answer  # type: ignore[union-attr]


@pytest.mark.parametrize("way", ["answer", "stream"])
async def test_rungs_with_a_reminder_are_skipped_where_no_system_turn_is_taken(way: str) -> None:
    answer = await answer_of(guard(moved_is_calm, no_system), way)
    assert (answer.trace.outcome, answer.trace.move) == ("neutralised", WITHOUT_REMINDER)
    assert answer.text.endswith(CALM.strip())


@pytest.mark.parametrize("way", ["answer", "stream"])
async def test_rungs_with_a_reminder_are_skipped_where_the_context_has_no_room_for_one(way: str) -> None:
    answer = await answer_of(guard(moved_is_calm, too_long_for_a_reminder), way)
    assert (answer.trace.outcome, answer.trace.move) == ("neutralised", WITHOUT_REMINDER)


async def test_where_no_rung_can_be_tried_the_fallback_stands() -> None:
    answer = await answer_of(guard(HARM, no_system, method=Race(ladder=Race().ladder[:1])), "answer")
    assert (answer.text, answer.trace.outcome) == (Policy().notice, "blocked")
    assert answer.trace.stop_reason == "optimiser: no reminder fits"


async def test_bridges_without_room_are_skipped() -> None:
    bridges = ("... " * 30, "... but")

    def script(call: ScriptedCall) -> str:
        return CALM if call.prefix.endswith("... but") else HARM[len(call.prefix) :]

    answer = await answer_of(guard(script, longer_than(50), bridges=bridges), "stream")
    assert (answer.trace.outcome, answer.trace.move) == ("neutralised", "bridge")


async def test_where_what_has_left_fills_the_context_the_fallback_stands() -> None:
    guarded = guard(HARM, longer_than(12))
    events = [event async for event in guarded.stream(ASK, Sampling())]
    answer = events[-1].answer  # type: ignore[union-attr]
    assert answer.trace.stop_reason == "unprepared: ConfigurationError"
    assert answer.text.endswith(f"\n\n{Policy().notice}")
    assert HARM.startswith(answer.text.removesuffix(f"\n\n{Policy().notice}"))
    started, ended = (sum(isinstance(e, kind) for e in events) for kind in (RepairStarted, RepairFinished))
    assert started == ended == 1
