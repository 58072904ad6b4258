"""The spans of answers: which there are, whose children they are, and that each ends once."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import pytest
from memory import HARM, SAFE, START, Memory, ask, guard, read
from opentelemetry import trace
from opentelemetry.trace import StatusCode

from tta_middleware import Message, Noise, Repair, Sampling, TTAChatModel
from tta_middleware.errors import EngineError, MissingExtraError, UnsafeAnswerError
from tta_middleware.guard.events import Finished
from tta_middleware.observing import NOBODY, observer
from tta_middleware.telemetry import FORMAT_VERSION, instrument, uninstrument
from tta_middleware.telemetry.format import EVALUATION_EVENT
from tta_middleware.testing.scripted_engine import ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging


async def test_a_repaired_stream_is_one_tree(memory: Memory) -> None:
    events = await read(guard().stream(ask("late"), Sampling(max_new_tokens=99, temperature=0.5, seed=3)))
    told = next(event.answer for event in events if isinstance(event, Finished))
    [answer] = memory.named("chat ")
    waves, checks = memory.named("repair wave"), memory.named("moderate ")
    about = memory.answer()
    assert answer.parent is None
    assert {wave.parent.span_id for wave in waves if wave.parent} == {answer.context.span_id}
    parents = {check.parent.span_id for check in checks if check.parent}
    assert parents == {answer.context.span_id, *(wave.context.span_id for wave in waves)}
    assert len(checks) == told.trace.moderation_calls
    assert len(waves) == len(told.trace.steps)
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "tta_middleware",
        "gen_ai.request.model": "scripted",
        "gen_ai.request.max_tokens": 99,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": 3,
        "gen_ai.request.stream": True,
        "gen_ai.response.finish_reasons": (told.finish_reason,),
        "gen_ai.usage.input_tokens": told.prompt_tokens,
        "gen_ai.usage.output_tokens": told.trace.generated_tokens,
        "tta.format.version": FORMAT_VERSION,
        "tta.outcome": "neutralised",
        "tta.generations": told.trace.generations,
        "tta.first.flagged": True,
    }
    assert {name: about.get(name) for name in expected} == expected
    assert about["gen_ai.response.time_to_first_chunk"] > 0
    assert "error.type" not in about
    assert not any(span.status.status_code is StatusCode.ERROR for span in memory.spans)


async def test_each_verdict_is_an_event_on_the_span_of_what_was_judged(memory: Memory) -> None:
    await guard(prompt_check="user").answer(ask("late"))
    events = [event for span in memory.spans for event in span.events if event.name == EVALUATION_EVENT]
    scored = [span for span in memory.named("moderate ") if "tta.score" in (span.attributes or {})]
    labels = [(event.attributes or {})["gen_ai.evaluation.score.label"] for event in events]
    assert len(events) == len(scored)
    assert {"flagged", "passed"} == set(labels)
    [answer] = memory.named("chat ")
    stages = {(event.attributes or {})["tta.moderation.stage"] for event in answer.events}
    assert stages == {"prompt", "output"}
    waves = [
        (event.attributes or {})["tta.moderation.stage"] for span in memory.named("repair") for event in span.events
    ]
    assert set(waves) == {"repair"}


async def test_answers_side_by_side_keep_their_own_parents(memory: Memory) -> None:
    tracer = memory.tracers.get_tracer("test")
    shared = guard()

    async def one(number: int) -> tuple[int, int]:
        text = ("late", "roses", "attack")[number % 3]
        with tracer.start_as_current_span(f"user {number}") as span:
            if number % 2:
                calls = (await shared.answer(ask(f"{text} {number}"))).trace.moderation_calls
            else:
                events = await read(shared.stream(ask(f"{text} {number}")))
                [calls] = [event.answer.trace.moderation_calls for event in events if isinstance(event, Finished)]
            return span.get_span_context().trace_id, calls

    found = dict(await asyncio.gather(*(one(number) for number in range(9))))
    assert len(found) == 9
    for trace_id, calls in found.items():
        mine = [span for span in memory.spans if span.context.trace_id == trace_id]
        ids = {span.context.span_id for span in mine}
        [user] = [span for span in mine if span.name.startswith("user")]
        [answer] = [span for span in mine if span.name.startswith("chat")]
        assert answer.parent is not None
        assert answer.parent.span_id == user.context.span_id
        assert all(span.parent.span_id in ids for span in mine if span.parent)
        assert sum(span.name.startswith("moderate") for span in mine) == calls


@pytest.mark.parametrize("most", range(1, 8))
async def test_a_stream_that_is_closed_ends_its_spans_with_an_error_type(memory: Memory, most: int) -> None:
    events = await read(guard().stream(ask("late")), most)
    if not isinstance(events[-1], Finished):
        assert memory.answer()["error.type"] == "cancelled"
    memory.check_ends()
    assert trace.get_current_span() is trace.INVALID_SPAN


async def test_whoever_leaves_after_the_last_event_has_cancelled_nothing(memory: Memory) -> None:
    everything = await read(guard().stream(ask()))
    memory.spans.clear()
    await read(guard().stream(ask()), len(everything))
    assert memory.answer()["tta.outcome"] == "clean"
    assert "error.type" not in memory.answer()


async def test_a_cancelled_call_ends_its_span(memory: Memory) -> None:
    asked = asyncio.Event()

    async def never() -> None:
        asked.set()
        await asyncio.Event().wait()

    call = asyncio.create_task(guard(ScriptedModerator(gate=never)).answer(ask()))
    await asked.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    [check] = memory.named("moderate ")
    assert memory.answer()["error.type"] == "cancelled"
    assert (check.attributes or {})["tta.cancelled"] is True
    assert check.status.status_code is StatusCode.UNSET


async def test_an_answer_that_broke_names_its_error_and_nothing_of_its_message(memory: Memory) -> None:
    with pytest.raises(EngineError):
        await read(guard().stream(ask("broken")))
    assert memory.answer()["error.type"] == "EngineError"
    assert "the script ends here" not in memory.everything()


async def test_a_block_is_an_answer_and_one_that_raises_an_error(memory: Memory) -> None:
    await guard(repair=Repair()).answer(ask("attack"))
    assert memory.answer()["gen_ai.response.finish_reasons"] == ("content_filter",)
    assert "error.type" not in memory.answer()
    memory.spans.clear()
    with pytest.raises(UnsafeAnswerError):
        await guard(repair=Repair(fallback="raise")).answer(ask("attack"))
    about = memory.answer()
    assert (about["error.type"], about["tta.outcome"]) == ("UnsafeAnswerError", "blocked")


@pytest.mark.parametrize("text", ["roses", "late", "attack"])
async def test_no_text_is_told(memory: Memory, text: str) -> None:
    await read(guard(prompt_check="all").stream(ask(f"{text}, my secretword")))
    everything = memory.everything()
    for word in ("secretword", "harbour", "forbidden", "Visitors"):
        assert word not in everything


async def test_with_capture_content_what_left_is_told_and_what_was_withheld_is_not() -> None:
    told = Memory()
    instrument(capture_content=True, tracer_provider=told.tracers, meter_provider=told.meters)
    try:
        answer = await guard().answer(ask("late, my secretword"))
    finally:
        uninstrument()
    about = told.answer()
    assert "secretword" in about["gen_ai.input.messages"]
    assert answer.text == SAFE
    assert START in about["gen_ai.output.messages"]
    assert "forbidden" not in told.everything()
    assert HARM not in told.everything()


def chat_model() -> TTAChatModel:
    moderator = ScriptedModerator(score=flagging("forbidden"))
    return TTAChatModel(model=ScriptedEngine(SAFE), moderator=moderator, method=Noise(), seed=1)


async def test_langchain_s_ways_keep_the_parent(memory: Memory) -> None:
    tracer, model = memory.tracers.get_tracer("test"), chat_model()

    def parents() -> set[Any]:
        found = {span.parent and span.parent.span_id for span in memory.named("chat ")}
        memory.spans.clear()
        return found

    with tracer.start_as_current_span("user") as span:
        mine = {span.get_span_context().span_id}
        model.invoke("harbours?")
        assert parents() == mine
        list(model.stream("harbours?"))
        assert parents() == mine
        await model.ainvoke("harbours?")
        assert parents() == mine
        assert len([chunk async for chunk in model.astream("harbours?")]) > 1
        assert parents() == mine
        await model.abatch(["harbours?", "and piers?"])
        assert parents() == mine
        model.batch(["harbours?", "and piers?"])
        assert parents() == mine


def test_without_the_extra_only_who_asks_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tta_middleware.telemetry.otel", None)
    with pytest.raises(MissingExtraError, match=r"tta-middleware\[otel\]"):
        instrument()
    assert observer() is NOBODY


@pytest.mark.slow
def test_nothing_imports_opentelemetry_before_somebody_asks() -> None:
    program = (
        "import sys, tta_middleware.server, tta_middleware.telemetry as t; print(t.__name__ + '.otel' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("texts", [("forbidden roses", "tulips"), ("tulips", "forbidden roses")])
async def test_a_request_for_several_texts_says_what_the_worst_one_is(memory: Memory, texts: tuple[str, str]) -> None:
    messages = [Message("user", text) for text in texts]
    await guard(prompt_check="all").answer(messages)
    [check] = [
        span for span in memory.named("moderate ") if (span.attributes or {})["tta.moderation.stage"] == "prompt"
    ]
    about = check.attributes or {}
    assert (about["tta.score"], about["tta.flagged"]) == (0.9, True)
