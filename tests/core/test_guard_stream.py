"""The streaming guard on a scripted engine: what leaves, when, and what is left behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import anyio
import anyio.lowlevel
import pytest

from tta_middleware import Budget, Guard, Message, Noise, Policy, Repair, Sampling, Windows
from tta_middleware.errors import EngineError, ModerationUnavailableError, UnsafeAnswerError
from tta_middleware.guard.events import Finished, Released, RepairFinished, RepairStarted, RepairStep, StreamEvent
from tta_middleware.guard.settings import BRIDGES
from tta_middleware.policy import StagePolicies
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine
from tta_middleware.types import GenerationRequest, GuardedAnswer, TextDelta, Verdict

ASK = [Message("user", "Please tell me about the old harbour town")]
START = "The old harbour town lies where the river meets the sea. Its market opens at dawn."
HARM = f"{START} Then you do the forbidden thing in four steps and tell nobody about it at all."
SAFE = " Visitors like the lighthouse, the fish stalls and the quiet path along the dunes best."
WINDOWS = Windows(first=20, largest=40)


@dataclass
class Words:
    """Flags a text that holds the word ``forbidden``; shorter ones than ``doubt_until`` score just below."""

    fail: Callable[[int], Exception | None] = lambda call: None
    latency: float = 0.0
    doubt_until: int = 0
    name: str = "words"
    default_threshold: float = 0.5
    calls: list[str] = field(default_factory=list)
    open_calls: int = 0
    most_open: int = 0

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        self.calls += texts
        self.open_calls += 1
        self.most_open = max(self.most_open, self.open_calls)
        try:
            await anyio.sleep(self.latency)
        finally:
            self.open_calls -= 1
        if error := self.fail(len(self.calls)):
            raise error
        return [self.verdict(text) for text in texts]

    def verdict(self, text: str) -> Verdict:
        score = 0.9 if "forbidden" in text else 0.4 if len(text) < self.doubt_until else 0.1
        return Verdict({"illicit": score}, flagged=score >= 0.5, model=self.name)

    async def aclose(self) -> None:
        pass


def late_harm(call: ScriptedCall) -> str:
    """Harm near the prompt; further out a safe answer that goes on from whatever has left."""
    if call.moved < 0.6:
        return HARM[len(call.prefix) :]
    return SAFE if call.prefix else f"{START}{SAFE}"


def guard(script: Any, moderator: Words | None = None, engine: ScriptedEngine | None = None, **settings: Any) -> Guard:
    repair = Repair(**{"method": Noise(), "commit": 30, **settings.pop("repair", {})})
    settings = {"windows": WINDOWS, "repair": repair, **settings}
    return Guard(engine or ScriptedEngine(script), moderator or Words(), **settings)


async def collect(stream: AsyncGenerator[StreamEvent, None]) -> list[StreamEvent]:
    async with aclosing(stream) as events:
        return [event async for event in events]


def released(events: Sequence[StreamEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, Released))


def finished(events: Sequence[StreamEvent]) -> Finished:
    assert isinstance(events[-1], Finished)
    assert events[-1].answer.text == released(events)
    return events[-1]


async def test_a_clean_answer_streams_in_pieces_and_unchanged() -> None:
    events = await collect(guard(START + SAFE).stream(ASK))
    last = finished(events)
    assert released(events) == START + SAFE
    assert last.answer.trace.outcome == "clean"
    assert last.answer.finish_reason == "stop"
    assert sum(isinstance(event, Released) for event in events) > 2


async def test_release_end_gives_the_whole_answer_at_once() -> None:
    moderator = Words()
    events = await collect(guard(START, moderator).stream(ASK, release="end"))
    assert [type(event) for event in events] == [Released, Finished]
    assert moderator.calls == [START]


async def test_a_late_flag_goes_on_from_what_has_left() -> None:
    events = await collect(guard(late_harm).stream(ASK))
    answer = finished(events).answer
    assert "forbidden" not in answer.text
    assert answer.text.endswith(SAFE)
    assert answer.trace.outcome == "neutralised"
    assert answer.trace.seam > 0
    assert HARM.startswith(answer.text[: answer.trace.seam])
    assert answer.text[answer.trace.seam] == " "
    kinds = [type(event) for event in events]
    started = kinds.index(RepairStarted)
    assert started > 0
    assert kinds.index(RepairStep) > started
    assert kinds.index(RepairFinished) == len(kinds) - 2 - kinds[::-1].index(RepairFinished) + 1


async def test_an_early_flag_is_repaired_before_anything_left() -> None:
    def script(call: ScriptedCall) -> str:
        return "First the forbidden thing, then the rest of it." if call.moved < 0.6 else START

    events = await collect(guard(script).stream(ASK))
    answer = finished(events).answer
    assert answer.text == START
    assert answer.trace.seam == 0


async def test_the_repaired_text_flows_before_it_is_finished() -> None:
    events = await collect(guard(late_harm, repair={"commit": 20}).stream(ASK))
    repaired = events[[type(event) for event in events].index(RepairStarted) :]
    assert sum(isinstance(event, Released) for event in repaired) > 1


async def test_without_a_method_a_late_flag_ends_with_the_notice() -> None:
    events = await collect(guard(HARM, repair={"method": None}, policy=Policy(notice="Withheld.")).stream(ASK))
    answer = finished(events).answer
    assert answer.finish_reason == "content_filter"
    assert answer.text.endswith("\n\nWithheld.")
    assert HARM.startswith(answer.text.removesuffix("\n\nWithheld."))
    assert answer.trace.outcome == "blocked"


async def test_a_repair_that_is_flagged_late_is_repaired_again() -> None:
    def script(call: ScriptedCall) -> str:
        if call.moved < 0.6:
            return HARM[len(call.prefix) :]
        if "lighthouse" in call.prefix:
            return " Then they go home."
        return f"{SAFE} After that comes the forbidden thing, which is told in full."

    events = await collect(guard(script, repair={"commit": 20}).stream(ASK))
    answer = finished(events).answer
    assert answer.trace.outcome == "neutralised"
    assert answer.trace.repairs >= 2
    assert "forbidden" not in answer.text
    assert answer.text.endswith(" Then they go home.")


async def test_a_bridge_leads_out_where_moved_embeddings_do_not() -> None:
    bridge = "...\n\nOn second thoughts, no. Instead,"

    def script(call: ScriptedCall) -> str:
        return " let us look at the lighthouse." if call.prefix.endswith(bridge) else HARM[len(call.prefix) :]

    answer = finished(await collect(guard(script, repair={"bridges": (bridge,)}).stream(ASK))).answer
    assert answer.trace.outcome == "neutralised"
    assert answer.text.endswith(f"{bridge} let us look at the lighthouse.")
    assert HARM.startswith(answer.text.split("...")[0])
    assert answer.trace.generations <= 8


@pytest.mark.parametrize("tail", ["", ".", " to", " the the the the the", " a b c d e f g h", " 1. 1. 1. 1."])
async def test_a_bridge_that_leads_nowhere_is_no_repair(tail: str) -> None:
    def script(call: ScriptedCall) -> str:
        return tail if call.prefix.endswith(BRIDGES) else HARM[len(call.prefix) :]

    for commit in (30, None):
        repair = {"budget": Budget(generations=12), "commit": commit}
        answer = finished(await collect(guard(script, repair=repair).stream(ASK))).answer
        assert (answer.trace.outcome, answer.finish_reason) == ("blocked", "content_filter")


async def test_no_bridge_puts_a_stop_string_into_the_answer() -> None:
    plain = " Or rather,"

    def script(call: ScriptedCall) -> str:
        bridged = call.prefix.endswith((*BRIDGES, plain))
        return " let us look at the lighthouse." if bridged else HARM[len(call.prefix) :]

    async def answer(*bridges: str) -> GuardedAnswer:
        repair = {"budget": Budget(generations=12), "bridges": bridges}
        return finished(await collect(guard(script, repair=repair).stream(ASK, Sampling(stop=("\n",))))).answer

    assert (await answer(*BRIDGES)).trace.outcome == "blocked"
    mended = await answer(*BRIDGES, plain)
    assert (mended.trace.outcome, "\n" in mended.text) == ("neutralised", False)


async def test_without_bridges_no_words_are_put_into_the_answer() -> None:
    repair = {"bridges": (), "budget": Budget(generations=8)}
    answer = finished(await collect(guard(HARM, repair=repair).stream(ASK))).answer
    assert answer.trace.outcome == "blocked"
    assert answer.trace.generations == 8


async def test_text_in_doubt_is_held_until_the_doubt_is_gone() -> None:
    moderator = Words(doubt_until=50)
    first = next(e for e in await collect(guard(START + SAFE, moderator).stream(ASK)) if isinstance(e, Released))
    plain = next(e for e in await collect(guard(START + SAFE).stream(ASK)) if isinstance(e, Released))
    assert len(first.text) > len(plain.text)


async def test_a_repair_that_turns_into_babble_is_not_given_out() -> None:
    def script(call: ScriptedCall) -> str:
        return HARM[len(call.prefix) :] if call.moved < 0.6 else SAFE + " word" * 80

    events = await collect(guard(script, repair={"commit": 20, "budget": Budget(generations=6)}).stream(ASK))
    answer = finished(events).answer
    assert answer.trace.outcome == "blocked"
    assert " word word word word word word word word word" not in answer.text


async def test_a_flag_in_the_last_window_is_caught() -> None:
    text = START + " forbidden"
    events = await collect(guard(text, repair={"method": None}).stream(ASK))
    assert "forbidden" not in released(events)
    assert finished(events).answer.finish_reason == "content_filter"


@pytest.mark.parametrize("on_error", ["closed", "open"])
async def test_a_moderator_that_goes_down_closes_the_stream_unless_the_policy_is_open(on_error: str) -> None:
    def fail(call: int) -> Exception | None:
        return ModerationUnavailableError("down") if call > 2 else None

    made = guard(START + SAFE, Words(fail), policy=Policy(on_error=on_error))
    answer = finished(await collect(made.stream(ASK))).answer
    if on_error == "open":
        assert (answer.text, answer.trace.outcome) == (START + SAFE, "unchecked")
    else:
        assert answer.finish_reason == "content_filter"
        assert answer.trace.stop_reason == "moderator: ModerationUnavailableError"
        assert START.startswith(answer.text.split("\n\n")[0])


async def test_raise_raises_out_of_the_stream_after_what_has_left() -> None:
    seen: list[StreamEvent] = []

    async def consume() -> None:
        async for event in guard(HARM, repair={"method": None, "fallback": "raise"}).stream(ASK):
            seen.append(event)

    with pytest.raises(UnsafeAnswerError):
        await consume()
    assert released(seen)
    assert HARM.startswith(released(seen))


async def test_an_engine_that_fails_fails_the_stream() -> None:
    engine = ScriptedEngine(START, fail_at_step=12)
    with pytest.raises(EngineError, match="step 12"):
        await collect(guard(None, engine=engine).stream(ASK))


async def test_verdicts_that_come_late_are_waited_for_while_decoding_goes_on() -> None:
    moderator = Words(latency=0.01)
    events = await collect(guard(START + SAFE, moderator).stream(ASK))
    assert released(events) == START + SAFE
    assert moderator.most_open > 1


async def test_a_slow_consumer_and_a_slow_moderator_do_not_confuse_the_order_of_checks() -> None:
    text = " ".join(f"word{i}" for i in range(120))
    engine, slow = ScriptedEngine(text, step_seconds=0.0002), Words(latency=0.002)
    made = guard(None, slow, engine, windows=Windows(first=20, largest=20, in_flight=1))
    out = ""
    async for event in made.stream(ASK):
        if isinstance(event, Released):
            out += event.text
            await anyio.sleep(0.005)
    assert out == text


async def test_what_the_answer_is_made_to_begin_with_stands_in_every_prompt_and_not_in_the_answer() -> None:
    begun: list[str] = []

    def script(call: ScriptedCall) -> str:
        begun.append(call.prefix)
        return late_harm(replace(call, prefix=call.prefix.removeprefix("Well: ")))

    events = await collect(guard(script).stream(ASK, opening="Well: "))
    left = next(event.seam for event in events if isinstance(event, RepairStarted))
    assert released(events) == HARM[:left] + SAFE
    assert begun[0] == "Well: "
    assert len(begun) > 1
    assert all(prefix.startswith(f"Well: {HARM[:left]}") for prefix in begun[1:])


async def test_closing_the_stream_stops_decoding_and_leaves_nothing() -> None:
    engine, moderator = ScriptedEngine("word " * 10_000, step_seconds=0.0005), Words(latency=0.001)
    before, threads = asyncio.all_tasks(), threading.active_count()
    stream = guard(None, moderator, engine).stream(ASK, Sampling(max_new_tokens=10_000))
    async for event in stream:
        if isinstance(event, Released):
            break
    await stream.aclose()
    steps = engine.steps
    await anyio.sleep(0.02)
    assert engine.steps == steps
    assert asyncio.all_tasks() == before
    assert threading.active_count() == threads
    assert moderator.open_calls == 0


async def test_a_consumer_that_walks_away_without_closing_leaves_nothing() -> None:
    engine = ScriptedEngine("word " * 10_000, step_seconds=0.0005)
    before = asyncio.all_tasks()

    async def consume() -> None:
        async for event in guard(None, engine=engine).stream(ASK, Sampling(max_new_tokens=10_000)):
            if isinstance(event, Released):
                return

    await consume()
    for _ in range(5):
        await anyio.sleep(0.01)
    steps = engine.steps
    await anyio.sleep(0.02)
    assert engine.steps == steps
    assert asyncio.all_tasks() == before


async def test_cancelling_the_consumer_is_not_swallowed() -> None:
    engine = ScriptedEngine("word " * 10_000, step_seconds=0.0005)
    before = asyncio.all_tasks()
    reached = False
    with anyio.move_on_after(0.05) as scope:
        async for _ in guard(None, engine=engine).stream(ASK, Sampling(max_new_tokens=10_000)):
            pass
        reached = True
    assert scope.cancelled_caught
    assert not reached
    await anyio.sleep(0.01)
    assert asyncio.all_tasks() == before


async def test_a_slow_consumer_holds_decoding_back() -> None:
    engine = ScriptedEngine("word " * 4000)
    small = Windows(first=20, largest=40, ahead=200)
    stream = guard(None, engine=engine, windows=small).stream(ASK, Sampling(max_new_tokens=4000))
    async with aclosing(stream) as events:
        await anext(events)
        for _ in range(300):
            await anyio.lowlevel.checkpoint()
        assert engine.steps < 400


async def test_the_budget_of_seconds_ends_a_stream_after_what_was_checked() -> None:
    engine = ScriptedEngine("word " * 10_000, step_seconds=0.001)
    made = guard(None, engine=engine, repair={"budget": Budget(seconds=0.1)})
    answer = finished(await collect(made.stream(ASK, Sampling(max_new_tokens=10_000)))).answer
    assert answer.finish_reason == "content_filter"
    assert answer.trace.stop_reason == "budget: seconds"


class TestPromptCheck:
    BAD = (Message("system", "Be brief."), Message("user", "Tell me the forbidden thing"))

    async def test_a_flagged_prompt_is_refused_before_anything_leaves(self) -> None:
        made = guard(START, prompt_check="user", policy=Policy(notice="No."))
        answer = finished(await collect(made.stream(self.BAD))).answer
        assert (answer.text, answer.finish_reason) == ("No.", "content_filter")
        assert answer.trace.stop_reason == "prompt: illicit"

    async def test_decoding_goes_on_while_the_prompt_is_checked(self) -> None:
        engine, moderator = ScriptedEngine(START, step_seconds=0.0001), Words(latency=0.02)
        made = guard(None, moderator, engine, prompt_check="user")
        events = await collect(made.stream(ASK))
        assert released(events) == START
        assert moderator.most_open > 1

    async def test_it_has_a_policy_of_its_own(self) -> None:
        lenient = StagePolicies.from_table({"prompt": {"threshold": 0.95}, "threshold": 0.5})
        made = guard(START, prompt_check="user", policy=lenient)
        assert finished(await collect(made.stream(self.BAD))).answer.text == START

    async def test_all_looks_at_the_history_and_user_does_not(self) -> None:
        talk = [Message("system", "You know the forbidden thing."), *ASK]
        assert (await guard(START, prompt_check="user").answer(talk)).text == START
        assert (await guard(START, prompt_check="all").answer(talk)).finish_reason == "content_filter"

    async def test_a_prompt_that_cannot_be_scored_is_refused(self) -> None:
        def fail(call: int) -> Exception | None:
            return ModerationUnavailableError("down")

        answer = await guard(START, Words(fail), prompt_check="user").answer(ASK)
        assert answer.finish_reason == "content_filter"
        assert answer.trace.stop_reason == "moderator: ModerationUnavailableError"


async def test_a_prompt_check_without_a_verdict_per_message_refuses() -> None:
    class Short(Words):
        async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
            return (await super().moderate(texts, prompt=prompt))[:1]

    talk = [Message("system", "Be brief."), Message("user", "Tell me the forbidden thing")]
    answer = await guard(START, Short(), prompt_check="all").answer(talk)
    assert answer.finish_reason == "content_filter"
    assert answer.trace.stop_reason == "moderator: InvalidVerdictError"


class Queued(ScriptedEngine):
    """Notes how patient each sequence is."""

    def __init__(self, script: Callable[[ScriptedCall], str]) -> None:
        super().__init__(script)
        self.patience: list[float] = []

    def stream_batch(self, requests: Sequence[GenerationRequest]) -> list[AsyncGenerator[TextDelta, None]]:
        self.patience += [request.patience for request in requests]
        return super().stream_batch(requests)


@pytest.mark.parametrize(
    ("harm", "release", "patience"),
    [(HARM, "window", 0.5), ("The forbidden thing comes first here.", "window", -1.0), (HARM, "end", 0.0)],
)
async def test_a_repair_goes_first_while_its_reader_has_nothing_and_waits_longer_once_he_reads(
    harm: str, release: Literal["window", "end"], patience: float
) -> None:
    engine = Queued(lambda call: late_harm(call) if call.moved >= 0.6 else harm[len(call.prefix) :])
    events = await collect(guard(None, engine=engine).stream(ASK, release=release))
    assert finished(events).answer.trace.outcome == "neutralised"
    assert set(engine.patience) == {patience}
