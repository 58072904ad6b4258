"""What an answer's seconds hold: on a virtual clock, so that every delay is exact and nothing waits."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

import anyio
import pytest

from tta_middleware import Budget, Guard, Message, Noise, Policy, Race, Repair, Sampling, Windows
from tta_middleware.guard.events import Finished, Released, RepairFinished, RepairStarted, StreamEvent
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging
from tta_middleware.testing.virtual_time import now, run_in_virtual_time
from tta_middleware.types import FloatMatrix, GenerationRequest, GuardedAnswer, IntVector, PromptEmbeddings, TextDelta

ASK = [Message("user", "Please tell me about the old harbour town")]
CALM = "The old harbour town lies where the river meets the sea."


def guard(engine: ScriptedEngine, moderator: ScriptedModerator | None = None, **repair: Any) -> Guard:
    settings = Repair(**{"method": Noise(), **repair})
    return Guard(engine, moderator or ScriptedModerator(score=flagging("forbidden")), repair=settings, clock=now)


class TestLoading:
    """A model takes its time to load, once, and nobody's budget pays for it."""

    def answers(self, budget: Budget) -> tuple[GuardedAnswer, GuardedAnswer]:
        async def ask_twice() -> tuple[GuardedAnswer, GuardedAnswer]:
            guarded = guard(ScriptedEngine(CALM, step_seconds=0.1, load_seconds=40.0), budget=budget)
            return await guarded.answer(ASK), await guarded.answer(ASK)

        return run_in_virtual_time(ask_twice())

    def test_it_is_not_charged_to_the_first_answers_budget(self) -> None:
        first, _ = self.answers(Budget(seconds=5))
        assert (first.text, first.trace.outcome) == (CALM, "clean")

    def test_the_trace_tells_it_apart(self) -> None:
        first, second = self.answers(Budget())
        assert first.trace.load_seconds == 40.0
        assert second.trace.load_seconds == 0.0
        assert abs(first.trace.seconds - second.trace.seconds) < 1e-9
        assert first.trace.seconds < 2.0


HARM = (
    f"{CALM} Its market opens at dawn. Then you do the forbidden thing in four steps and tell nobody about it at all."
)
NUMBERS = " ".join(f"word{number}" for number in range(1500))
WINDOWS = Windows(first=20, largest=40)


class Watched(ScriptedEngine):
    """Notes when it is asked for what."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.asked: list[tuple[str, float]] = []

    async def embed(self, *args: Any, **kwargs: Any) -> PromptEmbeddings:
        self.asked.append(("embed", now()))
        await self.sleep(self.embed_seconds)
        return await super().embed(*args, **kwargs)

    async def directions(self, words: Sequence[str]) -> FloatMatrix:
        self.asked.append(("directions", now()))
        return await super().directions(words)

    async def nearest_tokens(self, rows: FloatMatrix) -> IntVector:
        self.asked.append(("nearest_tokens", now()))
        return await super().nearest_tokens(rows)

    def stream(self, request: GenerationRequest) -> AsyncGenerator[TextDelta, None]:
        self.asked.append(("stream", now()))
        return super().stream(request)

    embed_seconds: float = 0.0

    def after(self, second: float) -> list[str]:
        return [what for what, when in self.asked if when > second]


class TestTheEnd:
    """A budget of seconds ends the work in mid-stream; the trace and the text are what left, and nothing begins."""

    async def read(self, guarded: Guard, pause: float) -> list[tuple[float, StreamEvent]]:
        """A consumer who takes one event every ``pause`` seconds."""
        seen = []
        async for event in guarded.stream(ASK, Sampling(max_new_tokens=4000)):
            seen.append((now(), event))
            await anyio.sleep(pause)
        return seen

    def run(self, engine: Watched, seconds: float, pause: float, **repair: Any) -> list[tuple[float, StreamEvent]]:
        async def work() -> list[tuple[float, StreamEvent]]:
            settings = {"method": Race(), "commit": 30, "budget": Budget(seconds=seconds), **repair}
            moderator = ScriptedModerator(score=flagging("forbidden"), gate=lambda: anyio.sleep(0.02))
            guarded = Guard(engine, moderator, repair=Repair(**settings), windows=WINDOWS, clock=now)
            return await self.read(guarded, pause)

        return run_in_virtual_time(work())

    @pytest.mark.parametrize("pause", [0.0, 0.4, 3.0])
    def test_the_text_is_what_was_handed_over_however_slow_the_consumer(self, pause: float) -> None:
        engine = Watched(NUMBERS, step_seconds=0.01)
        seen = self.run(engine, seconds=5.0, pause=pause)
        answer = seen[-1][1].answer  # type: ignore[union-attr]
        assert answer.text == "".join(event.text for _, event in seen if isinstance(event, Released))
        assert answer.trace.stop_reason == "budget: seconds"
        assert answer.text.endswith(f"\n\n{Policy().notice}")
        assert engine.after(5.0) == []

    @pytest.mark.parametrize("pause", [0.0, 0.4, 3.0])
    def test_no_search_begins_after_it_when_a_repair_is_cut(self, pause: float) -> None:
        """The repair's text flows slowly when the time is over; a second repair would go on from it."""

        def script(call: ScriptedCall) -> str:
            harm = call.moved == 0 and "responsible" not in call.conversation
            return HARM[len(call.prefix) :] if harm else f" {NUMBERS}"

        engine = Watched(script, step_seconds=0.02)
        seen = self.run(engine, seconds=4.0, pause=pause)
        answer = seen[-1][1].answer  # type: ignore[union-attr]
        assert answer.text == "".join(event.text for _, event in seen if isinstance(event, Released))
        assert (answer.trace.outcome, answer.trace.stop_reason) == ("blocked", "budget: seconds")
        assert answer.trace.repairs == sum(isinstance(event, RepairStarted) for _, event in seen) <= 1
        assert engine.after(4.0) == []

    def test_no_search_begins_where_the_first_answer_took_all_there_was(self) -> None:
        engine = Watched(HARM, step_seconds=0.02)
        seen = self.run(engine, 60.0, 0.0, budget=Budget(generations=1))
        answer = seen[-1][1].answer  # type: ignore[union-attr]
        assert (answer.trace.stop_reason, answer.trace.repairs) == ("budget: generations", 0)
        assert not [event for _, event in seen if isinstance(event, RepairStarted | RepairFinished)]
        assert [what for what, _ in engine.asked] == ["embed", "stream"]

    def test_preparing_a_repair_is_cut_as_well(self) -> None:
        engine = Watched(HARM, step_seconds=0.01)
        engine.embed_seconds = 1.5
        seen = self.run(engine, seconds=4.0, pause=0.0)
        answer = seen[-1][1].answer  # type: ignore[union-attr]
        assert (answer.trace.stop_reason, answer.trace.repairs) == ("budget: seconds", 1)
        assert [type(event) for _, event in seen if not isinstance(event, Released)] == [
            RepairStarted,
            RepairFinished,
            Finished,
        ]
        assert seen[-1][0] == 4.0
        assert engine.after(4.0) == []
