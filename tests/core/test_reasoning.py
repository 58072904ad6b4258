"""Thoughts as a channel of their own: where they go, and that none leaves unchecked, on a scripted engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from tta_middleware import Budget, Guard, Message, Noise, Policy, Repair, Sampling, Windows
from tta_middleware.config import Reasoning
from tta_middleware.errors import ConfigurationError, ModerationUnavailableError
from tta_middleware.guard.events import Finished, Released, StreamEvent
from tta_middleware.policy import StagePolicies
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine
from tta_middleware.types import GuardedAnswer, Verdict

ASK = [Message("user", "Please tell me about the old harbour town")]
WINDOWS = Windows(first=20, largest=40)
THOUGHT = "They ask about a town. It has a harbour and a market, so I describe these two in turn."
BAD_THOUGHT = "They ask about a town. It has a harbour. I could tell the forbidden thing in four steps to them."
ANSWER = "The old harbour town lies where the river meets the sea. Its market opens at dawn."
BAD_ANSWER = "The old harbour town lies by the sea. Then you do the forbidden thing in four steps and hide."
CURE = "Visitors like the lighthouse, the fish stalls and the quiet path along the dunes best."


@dataclass
class Words:
    """Flags a text that holds the word ``forbidden``."""

    name: str = "words"
    default_threshold: float = 0.5
    down: bool = False
    calls: list[str] = field(default_factory=list)

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        self.calls += texts
        await anyio.lowlevel.checkpoint()
        if self.down:
            raise ModerationUnavailableError("gone")
        return [self._verdict(0.9 if "forbidden" in text else 0.1) for text in texts]

    def _verdict(self, score: float) -> Verdict:
        return Verdict({"illicit": score}, flagged=score >= 0.5, model=self.name)

    async def aclose(self) -> None:
        pass


def thinking(thought: str, answer: str, cure: str = CURE) -> Callable[[ScriptedCall], str]:
    """Thinks and answers; behind a closed thought, or a moved prompt, the answer is ``cure``."""

    def script(call: ScriptedCall) -> str:
        if "</think>" in call.prefix or call.moved >= 0.6:
            return cure
        return f"<think>\n{thought}\n</think>\n\n{answer}"

    return script


def guard(script: Any, words: Words | None = None, mode: Any = "hide", **settings: Any) -> Guard:
    reasoning = Reasoning(mode=mode, **settings.pop("reasoning", {}))
    repair = Repair(**{"method": Noise(), "commit": 30, **settings.pop("repair", {})})
    engine = settings.pop("engine", None) or ScriptedEngine(script, thinking=True)
    return Guard(engine, words or Words(), repair=repair, windows=WINDOWS, reasoning=reasoning, **settings)


async def streamed(made: Guard, sampling: Sampling | None = None) -> tuple[str, str, GuardedAnswer]:
    """Thoughts and answer as they left, and the last event's answer."""
    events: list[StreamEvent] = [event async for event in made.stream(ASK, sampling)]
    pieces = [event for event in events if isinstance(event, Released)]
    assert isinstance(events[-1], Finished)
    thought = "".join(piece.text for piece in pieces if piece.channel == "reasoning")
    return thought, "".join(piece.text for piece in pieces if piece.channel == "answer"), events[-1].answer


@pytest.mark.parametrize("mode", ["hide", "show", "off"])
@pytest.mark.parametrize("held", [False, True])
async def test_a_clean_answer_with_thoughts(mode: str, held: bool) -> None:
    words = Words()
    made = guard(thinking(THOUGHT, ANSWER, ANSWER), words, mode)
    if held:
        answer = await made.answer(ASK)
        thought, text = answer.reasoning, answer.text
    else:
        thought, text, answer = await streamed(made)
    assert text == answer.text == ANSWER
    assert thought == answer.reasoning == (THOUGHT if mode == "show" else "")
    assert answer.trace.outcome == "clean"
    assert any("so I describe" in call for call in words.calls) == (mode != "off")
    reasoning = answer.trace.reasoning
    if mode == "off":
        assert reasoning is None
    else:
        assert reasoning is not None
        assert (reasoning.mode, reasoning.checked, reasoning.closed) == (mode, True, "")
        assert 0 < reasoning.tokens < answer.trace.generated_tokens
        assert reasoning.score is not None


@pytest.mark.parametrize("mode", ["hide", "show"])
@pytest.mark.parametrize("held", [False, True])
async def test_a_flagged_thought_is_closed_and_the_model_answers(mode: str, held: bool) -> None:
    made = guard(thinking(BAD_THOUGHT, ANSWER), mode=mode)
    if held:
        answer = await made.answer(ASK)
        thought, text = answer.reasoning, answer.text
    else:
        thought, text, answer = await streamed(made)
    assert text == CURE
    assert BAD_THOUGHT.startswith(thought)
    assert "forbidden" not in thought
    assert bool(thought) == (mode == "show" and not held)
    assert (answer.trace.outcome, answer.trace.move) == ("neutralised", "thought closed")
    assert answer.trace.reasoning is not None
    assert answer.trace.reasoning.closed == "flagged"


@pytest.mark.parametrize("mode", ["hide", "show"])
async def test_a_flagged_answer_is_repaired_behind_its_thoughts(mode: str) -> None:
    thought, text, answer = await streamed(guard(thinking(THOUGHT, BAD_ANSWER), mode=mode))
    assert thought == (THOUGHT if mode == "show" else "")
    assert text.endswith(CURE)
    assert "forbidden" not in text
    assert answer.trace.outcome == "neutralised"


async def test_candidates_may_think_too() -> None:
    def script(call: ScriptedCall) -> str:
        answer, thought = (CURE, THOUGHT) if call.moved >= 0.6 else (ANSWER, BAD_THOUGHT)
        whole = f"<think>\n{thought}\n</think>\n\n{answer}"
        return whole if not call.prefix else whole.removeprefix(call.prefix) if whole.startswith(call.prefix) else CURE

    made = guard(script, mode="show", repair={"reasoning_tokens": None})
    answer = await made.answer(ASK)
    assert (answer.reasoning, answer.text, answer.trace.outcome) == (THOUGHT, CURE, "neutralised")


@pytest.mark.parametrize("mode", ["hide", "show"])
@pytest.mark.parametrize("policy", ["checked", "unchecked"])
async def test_a_thought_without_end_is_no_clean_answer(mode: str, policy: Any) -> None:
    stages = StagePolicies.of(0.5).model_copy(update={"hidden_reasoning": policy})
    made = guard(thinking(THOUGHT * 50, ANSWER), mode=mode, policy=stages)
    thought, text, answer = await streamed(made, Sampling(max_new_tokens=60))
    assert text == ""
    assert bool(thought) == (mode == "show")
    assert (answer.trace.outcome, answer.trace.stop_reason) == ("unanswered", "reasoning: length")
    assert answer.finish_reason == "length"


@pytest.mark.parametrize("mode", ["hide", "show"])
async def test_a_thought_that_is_too_long_is_closed(mode: str) -> None:
    made = guard(thinking(THOUGHT * 50, ANSWER), mode=mode, reasoning={"max_tokens": 12})
    thought, text, answer = await streamed(made, Sampling(max_new_tokens=200))
    assert text == CURE
    assert (THOUGHT * 2).startswith(thought)
    assert answer.trace.outcome == "clean"
    assert answer.trace.reasoning is not None
    assert answer.trace.reasoning.closed == "too long"
    assert answer.trace.reasoning.tokens in (12, 13)


async def test_a_budget_that_the_thought_keeps_changes_nothing() -> None:
    made = guard(thinking(THOUGHT, ANSWER), mode="show", reasoning={"max_tokens": 500})
    thought, text, answer = await streamed(made)
    assert (thought, text) == (THOUGHT, ANSWER)
    assert answer.trace.reasoning is not None
    assert answer.trace.reasoning.closed == ""


async def test_hidden_thoughts_may_stay_unchecked_visibly() -> None:
    words = Words()
    stages = StagePolicies.from_table({"threshold": 0.5, "hidden_reasoning": "unchecked"})
    _, text, answer = await streamed(guard(thinking(BAD_THOUGHT, ANSWER), words, policy=stages))
    assert text == ANSWER
    assert not any("They ask" in call for call in words.calls)
    assert answer.trace.reasoning is not None
    assert (answer.trace.reasoning.checked, answer.trace.reasoning.score) == (False, None)


async def test_shown_thoughts_are_checked_whatever_the_policy_says() -> None:
    stages = StagePolicies.from_table({"threshold": 0.5, "hidden_reasoning": "unchecked"})
    thought, text, _ = await streamed(guard(thinking(BAD_THOUGHT, ANSWER), mode="show", policy=stages))
    assert "forbidden" not in thought
    assert text == CURE


async def test_thoughts_have_a_policy_of_their_own() -> None:
    stages = StagePolicies.from_table({"threshold": 0.5, "reasoning": {"threshold": 0.95}})
    thought, text, answer = await streamed(guard(thinking(BAD_THOUGHT, ANSWER), mode="show", policy=stages))
    assert (thought, text) == (BAD_THOUGHT, ANSWER)
    assert answer.trace.outcome == "clean"


async def test_thoughts_that_cannot_be_scored_are_withheld() -> None:
    made = guard(thinking(THOUGHT, ANSWER), Words(down=True), "show", policy=Policy(threshold=0.5, notice="No."))
    assert (await streamed(made))[:2] == ("", "No.")


async def test_several_thoughts_before_an_answer_and_a_mark_within_it() -> None:
    script = f"<think>{THOUGHT}</think> <think>One more.</think>{ANSWER} <think> is a mark. {CURE}"
    thought, text, answer = await streamed(guard(script, mode="show"))
    assert thought == f"{THOUGHT}\n\nOne more."
    assert text == f"{ANSWER} <think> is a mark. {CURE}"
    assert answer.trace.outcome == "clean"


async def test_an_empty_thought_and_none_at_all() -> None:
    assert (await streamed(guard(f"<think>\n\n</think>\n\n{ANSWER}", mode="show")))[:2] == ("", ANSWER)
    assert (await streamed(guard(ANSWER, mode="show")))[:2] == ("", ANSWER)


async def test_template_arguments_are_checked_at_the_edge() -> None:
    engine = ScriptedEngine(ANSWER, thinking=True, template=("enable_thinking",))
    made = guard(None, engine=engine, reasoning={"template": {"enable_thinking": False}})
    assert (await made.answer(ASK)).text == ANSWER
    made = guard(None, engine=engine, reasoning={"template": {"reasoning_effort": "low"}})
    with pytest.raises(ConfigurationError, match="reasoning_effort"):
        await made.answer(ASK)


@pytest.mark.parametrize("most", [None, 10])
async def test_a_consumer_that_leaves_stops_the_thinking_and_the_answer_behind_it(most: int | None) -> None:
    engine = ScriptedEngine(thinking(THOUGHT * 50, ANSWER, CURE * 50), thinking=True)
    made = guard(None, engine=engine, mode="show", reasoning={"max_tokens": most})
    async with aclosing(made.stream(ASK, Sampling(max_new_tokens=5000))) as events:
        async for event in events:
            if isinstance(event, Released) and (most is None or event.channel == "answer"):
                break
    steps = engine.steps
    assert steps < 300
    for _ in range(20):
        await anyio.lowlevel.checkpoint()
    assert engine.steps == steps


async def test_a_budget_of_seconds_ends_a_thought() -> None:
    engine = ScriptedEngine(thinking(THOUGHT * 50, ANSWER), thinking=True, step_seconds=0.001)
    repair = {"budget": Budget(seconds=0.05)}
    made = guard(None, engine=engine, mode="show", repair=repair, policy=Policy(threshold=0.5, notice="No."))
    thought, text, answer = await streamed(made, Sampling(max_new_tokens=5000))
    assert (THOUGHT * 50).startswith(thought)
    assert text == "No."
    assert (answer.trace.outcome, answer.trace.stop_reason) == ("blocked", "budget: seconds")
