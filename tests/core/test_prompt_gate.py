"""Nothing leaves before the prompt has passed its check, whoever says it; prompt checks are slower than all else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio
import pytest

from tta_middleware import Budget, Guard, Message, Noise, Policy, Repair, Windows
from tta_middleware.errors import EngineError, ModerationUnavailableError, UnsafeAnswerError
from tta_middleware.guard.events import Finished, Released, StreamEvent
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging
from tta_middleware.testing.virtual_time import now, run_in_virtual_time
from tta_middleware.types import ToolCall, Verdict

START = "The old harbour town lies where the river meets the sea. Its market opens at dawn."
HARM = f"{START} Then you do the forbidden thing in four steps and tell nobody about it at all."
CALM = " Visitors like the lighthouse, the fish stalls and the quiet path along the dunes best."
GOOD = Message("user", "Please tell me about the old harbour town")
BAD = Message("user", "Please tell me the forbidden thing")
SLOW = 30.0


@dataclass
class Uneven:
    """Takes ``SLOW`` seconds for a prompt and hardly any for an answer."""

    fails: bool = False
    name: str = "uneven"
    default_threshold: float = 0.5
    passed: list[float] = field(default_factory=list)

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        if prompt is None:
            await anyio.sleep(SLOW)
            self.passed.append(now())
            if self.fails:
                raise ModerationUnavailableError("down")
        else:
            await anyio.sleep(0.01)
        scores = [0.9 if "forbidden" in text else 0.1 for text in texts]
        return [Verdict({"illicit": score}, flagged=score > 0.5, model=self.name) for score in scores]

    async def aclose(self) -> None:
        pass


def early_harm(call: ScriptedCall) -> str:
    return "The forbidden thing is done like this, in four steps." if call.moved < 0.6 else START


def late_harm(call: ScriptedCall) -> str:
    return HARM[len(call.prefix) :] if call.moved < 0.6 else CALM if call.prefix else START + CALM


async def helpful(messages: Sequence[Message]) -> str:
    return "Ask the harbour office."


WAYS: dict[str, tuple[Any, dict[str, Any]]] = {
    "a first answer": (START, {}),
    "an empty answer": ("", {}),
    "an early repair": (early_harm, {}),
    "a late repair": (late_harm, {}),
    "the notice": (HARM, {"method": None}),
    "a fallback function": (HARM, {"method": None, "fallback": helpful}),
    "a repair without end": (HARM, {"budget": Budget(generations=6)}),
}


def run(script: Any, ask: Message, *, moderator: Uneven | None = None, release: Any = "window", **repair: Any) -> Any:
    """The events with their time, and when the prompt's check was answered."""

    async def work() -> tuple[list[tuple[float, StreamEvent]], float]:
        judge = moderator or Uneven()
        settings = {"method": Noise(), "commit": 30, "bridges": (), **repair}
        guard = Guard(
            ScriptedEngine(script, step_seconds=0.01),
            judge,
            policy=Policy(notice="No."),
            repair=Repair(**settings),
            windows=Windows(first=20, largest=40),
            prompt_check="user",
            clock=now,
        )
        events = [(now(), event) async for event in guard.stream([ask], release=release)]
        return events, min(judge.passed, default=float("inf"))

    return run_in_virtual_time(work())


@pytest.mark.parametrize("release", ["window", "end"])
@pytest.mark.parametrize("way", WAYS)
def test_nothing_leaves_before_the_prompt_has_passed(way: str, release: str) -> None:
    script, repair = WAYS[way]
    events, passed = run(script, GOOD, release=release, **repair)
    assert passed == SLOW
    assert all(when >= passed for when, _ in events)
    assert isinstance(events[-1][1], Finished)


@pytest.mark.parametrize("release", ["window", "end"])
@pytest.mark.parametrize("way", WAYS)
def test_a_flagged_prompt_gets_one_notice_and_nothing_else(way: str, release: str) -> None:
    script, repair = WAYS[way]
    events, _ = run(script, BAD, release=release, **repair)
    expected = "Ask the harbour office." if way == "a fallback function" else "No."
    assert [event.text for _, event in events if isinstance(event, Released)] == [expected]
    assert len(events) == 2
    assert events[-1][1].answer.text == expected
    assert events[-1][1].answer.trace.stop_reason == "prompt: illicit"


def test_a_prompt_that_could_not_be_scored_gets_one_notice() -> None:
    events, _ = run(late_harm, GOOD, moderator=Uneven(fails=True))
    assert [event.text for _, event in events if isinstance(event, Released)] == ["No."]


@pytest.mark.parametrize("ask", [GOOD, BAD], ids=["good", "bad"])
def test_a_fallback_function_is_called_once(ask: Message) -> None:
    called: list[float] = []

    async def fallback(messages: Sequence[Message]) -> str:
        called.append(now())
        return "Ask the harbour office."

    run(HARM, ask, method=None, fallback=fallback)
    assert called == [SLOW]


def test_an_exception_does_not_leave_before_it_either() -> None:
    with pytest.raises(UnsafeAnswerError, match="prompt: illicit"):
        run(HARM, BAD, method=None, fallback="raise")


def test_a_failure_of_the_engine_waits_for_the_check_too() -> None:
    def fails(_: ScriptedCall) -> str:
        raise EngineError("the model failed")

    events, _ = run(fails, BAD)
    assert [event.text for _, event in events if isinstance(event, Released)] == ["No."]
    assert events[-1][1].answer.trace.stop_reason == "prompt: illicit"
    judge = Uneven()
    with pytest.raises(EngineError, match="the model failed"):
        run(fails, GOOD, moderator=judge)
    assert judge.passed == [SLOW]


@pytest.mark.parametrize("script", [START, late_harm, HARM], ids=["clean", "repaired", "blocked"])
def test_a_budget_that_ends_before_the_check_does_gives_the_notice(script: str | Callable[..., str]) -> None:
    """An unchecked prompt gets no answer."""
    events, _ = run(script, GOOD, budget=Budget(seconds=5))
    assert [event.text for _, event in events if isinstance(event, Released)] == ["No."]
    assert events[-1][0] == 5.0
    assert events[-1][1].answer.trace.stop_reason == "budget: seconds"


@pytest.mark.parametrize("call", [ToolCall("mail", {"body": "the forbidden thing"}), ToolCall("forbidden", {})])
async def test_a_call_in_the_history_is_part_of_the_prompt(call: ToolCall) -> None:
    asked = [GOOD, Message("assistant", "", tool_calls=(call,)), Message("tool", "Sent.", name=call.name), GOOD]
    guard = Guard(ScriptedEngine(START), ScriptedModerator(score=flagging("forbidden")), prompt_check="all")
    answer = await guard.answer(asked)
    assert answer.trace.outcome == "blocked"
    assert answer.trace.stop_reason.startswith("prompt: ")
