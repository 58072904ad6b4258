"""What a guard tells its observer: each beginning has one end, whatever ends it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field

import pytest

from tta_middleware import Guard, Message, Noise, Repair, Sampling, Windows
from tta_middleware.guard.events import Released
from tta_middleware.observing import Asked, CheckStage, observe_everywhere, observed_by, observer
from tta_middleware.policy import Policy
from tta_middleware.testing.delays import Unequal, slow_even
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging
from tta_middleware.types import GuardedAnswer, StepTrace, Verdict

ASK = [Message("user", "Please tell me about the old harbour town")]
START = "The old harbour town lies where the river meets the sea. Its market opens at dawn."
HARM = f"{START} Then you do the forbidden thing in four steps and tell nobody about it at all."


def late_harm(call: ScriptedCall) -> str:
    return HARM[len(call.prefix) :] if call.moved < 0.6 else " Visitors like the lighthouse and the quiet path best."


@dataclass
class Notes:
    """Writes down what it hears; an answer's parts stand between its beginning and its end."""

    lines: list[str] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    answer: GuardedAnswer | None = None

    @contextmanager
    def _spanning(self, what: str) -> Iterator[Notes]:
        self.lines.append(f"{what} begins")
        try:
            yield self
        except BaseException as error:
            self.lines.append(f"{what} ends with {type(error).__name__}")
            raise
        else:
            self.lines.append(f"{what} ends")

    def answering(self, asked: Asked) -> Iterator[Notes]:  # type: ignore[override]
        self.asked.append(asked)
        return self._spanning("answer")  # type: ignore[return-value]

    def checking(self, stage: CheckStage) -> Iterator[Notes]:
        return self._spanning(f"check of {stage}")  # type: ignore[return-value]

    def repairing(self, moves: Sequence[str]) -> Iterator[Notes]:
        return self._spanning(f"wave of {len(moves)}")  # type: ignore[return-value]

    def scored(self, verdict: Verdict, policy: Policy, end: int | None = None) -> None:
        self.lines.append("flagged" if policy.decide(verdict).flagged else "passed")

    def tried(self, step: StepTrace) -> None:
        self.lines.append("tried")

    def released(self) -> None:
        self.lines.append("released")

    def answered(self, answer: GuardedAnswer) -> None:
        self.answer = answer
        self.lines.append("answered")


def guard(**settings: object) -> Guard:
    moderator = Unequal(ScriptedModerator(score=flagging("forbidden")), slow_even)
    repair = Repair(method=Noise(), commit=30)
    return Guard(ScriptedEngine(late_harm), moderator, repair=repair, windows=Windows(first=20, largest=40), **settings)  # type: ignore[arg-type]


async def test_a_repaired_stream_is_told_from_its_beginning_to_its_end() -> None:
    notes = Notes()
    with observed_by(notes):  # type: ignore[arg-type]
        async with aclosing(guard().stream(ASK, Sampling(max_new_tokens=64))) as events:
            async for _ in events:
                pass
    assert notes.lines[0] == "answer begins"
    assert notes.lines[-2:] == ["answered", "answer ends"]
    assert notes.lines.index("flagged") < notes.lines.index("wave of 2 begins")
    assert "released" in notes.lines
    begun = sorted(line.removesuffix(" begins") for line in notes.lines if line.endswith(" begins"))
    ended = sorted(line.partition(" ends")[0] for line in notes.lines if " ends" in line)
    assert begun == ended
    assert notes.answer is not None
    assert notes.answer.trace.outcome == "neutralised"
    checks = sum(line.startswith("check") and line.endswith("begins") for line in notes.lines)
    assert checks == notes.answer.trace.moderation_calls
    assert [(one.stream, one.method) for one in notes.asked] == [(True, "noise")]


async def test_a_closed_stream_ends_its_answer_once_and_as_cancelled() -> None:
    notes = Notes()
    with observed_by(notes):  # type: ignore[arg-type]
        async with aclosing(guard().stream(ASK)) as events:
            async for event in events:
                if isinstance(event, Released):
                    break
    assert [line for line in notes.lines if line.startswith("answer")] == [
        "answer begins",
        "answer ends with CancelledError",
    ]


async def test_an_observer_hears_of_its_own_context_and_the_process_s_of_the_rest() -> None:
    here, everywhere = Notes(), Notes()
    before = observe_everywhere(everywhere)  # type: ignore[arg-type]
    try:

        async def ask(notes: Notes | None) -> None:
            if notes is None:
                await guard().answer(ASK)
                return
            with observed_by(notes):  # type: ignore[arg-type]
                await guard().answer(ASK)

        await asyncio.gather(ask(here), ask(None), ask(None))
    finally:
        observe_everywhere(before)  # type: ignore[arg-type]
    assert (len(here.asked), len(everywhere.asked)) == (1, 2)
    assert observer() is before


@pytest.mark.parametrize("prompt_check", ["user", "all"])
async def test_a_refused_prompt_is_one_check_of_its_own(prompt_check: str) -> None:
    notes = Notes()
    with observed_by(notes):  # type: ignore[arg-type]
        answer = await guard(prompt_check=prompt_check).answer([Message("user", "Something forbidden?")])
    assert answer.trace.outcome == "blocked"
    assert notes.lines.count("check of prompt begins") == 1
    assert notes.lines[-1] == "answer ends"
