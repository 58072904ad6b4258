"""What an answer's seconds hold: on a virtual clock, so that every delay is exact and nothing waits."""

from __future__ import annotations

from typing import Any

from tta_middleware import Budget, Guard, Message, Noise, Repair
from tta_middleware.engines.scripted import ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging
from tta_middleware.testing.virtual_time import now, run_in_virtual_time
from tta_middleware.types import GuardedAnswer

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
