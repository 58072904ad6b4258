"""Many requests at once through LangChain's own methods: they share the decode batch of one engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import pytest
from anyio.lowlevel import checkpoint
from langchain_core.callbacks import AsyncCallbackHandler
from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableConfig

from tta_middleware import TTAChatModel
from tta_middleware.assembly import Runtime
from tta_middleware.engines.decoding.decoder import DecoderStats
from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.errors import EmptyPromptError

QUESTIONS = [f"Name {count} animals that live in the {place}." for count in (2, 3) for place in ("sea", "wood")]
MIXED = [
    "Write a long story about a lighthouse keeper and the sea.",
    "Answer with one word only: what colour is snow?",
    "Describe the history of bread at length.",
    "Explain in detail how a bicycle is built.",
]
SHORT = 1
"""The one of them whose answer ends by itself, after a few tokens."""

LONG = 64
"""Tokens that the others would take if they were let run."""

Ask = Callable[[TTAChatModel, RunnableConfig | None], Awaitable[list[AIMessage]]]


async def by_abatch(model: TTAChatModel, config: RunnableConfig | None) -> list[AIMessage]:
    return await model.abatch(QUESTIONS, config)


async def by_abatch_as_completed(model: TTAChatModel, config: RunnableConfig | None) -> list[AIMessage]:
    found: dict[int, Any] = {index: answer async for index, answer in model.abatch_as_completed(QUESTIONS, config)}
    return [found[index] for index in range(len(QUESTIONS))]


async def by_batch(model: TTAChatModel, config: RunnableConfig | None) -> list[AIMessage]:
    return await asyncio.to_thread(model.batch, QUESTIONS, config)


@pytest.fixture(scope="module")
def alone(runtime: Runtime) -> list[str]:
    model = TTAChatModel(max_new_tokens=8, dtype="float32", runtime=runtime)
    return [model.invoke(question).text for question in QUESTIONS]


@pytest.fixture
def model(runtime: Runtime) -> TTAChatModel:
    return TTAChatModel(max_new_tokens=8, dtype="float32", runtime=runtime)


def stats(model: TTAChatModel) -> DecoderStats:
    engine = model._engine(model.model)
    assert isinstance(engine, TransformersEngine)
    return engine.stats()


async def sequences_a_step(model: TTAChatModel, ask: Ask, config: RunnableConfig | None) -> tuple[float, list[str]]:
    before = stats(model)
    answers = await ask(model, config)
    after = stats(model)
    return (after.tokens - before.tokens) / (after.steps - before.steps), [answer.text for answer in answers]


@pytest.mark.parametrize(
    "ask", [by_abatch, *(pytest.param(ask, marks=pytest.mark.slow) for ask in (by_batch, by_abatch_as_completed))]
)
async def test_a_batch_decodes_side_by_side_and_answers_like_single_calls(
    model: TTAChatModel, alone: list[str], ask: Ask
) -> None:
    shared, answers = await sequences_a_step(model, ask, {"max_concurrency": len(QUESTIONS)})
    assert shared > 1.5
    assert answers == alone


@pytest.mark.parametrize("ask", [by_abatch_as_completed, by_abatch])
@pytest.mark.slow
async def test_max_concurrency_bounds_how_many_decode_at_once(model: TTAChatModel, alone: list[str], ask: Ask) -> None:
    one_by_one, answers = await sequences_a_step(model, ask, {"max_concurrency": 1})
    assert one_by_one == pytest.approx(1.0)
    assert answers == alone


class Ends(AsyncCallbackHandler):
    """Notes which calls ended, by their tag."""

    def __init__(self) -> None:
        self.order: list[int] = []

    async def on_llm_end(self, response: Any, *, tags: list[str] | None = None, **_: Any) -> None:
        self.order += [int(tag) for tag in tags or ()]


@pytest.mark.slow
async def test_answers_come_with_their_index_in_the_order_in_which_they_are_done(model: TTAChatModel) -> None:
    ends = Ends()
    configs: list[RunnableConfig] = [{"callbacks": [ends], "tags": [str(index)]} for index in range(len(MIXED))]
    found = [index async for index, _ in model.abatch_as_completed(MIXED, configs, max_new_tokens=24)]
    assert found == ends.order
    assert found[0] == SHORT
    assert sorted(found) == list(range(len(MIXED)))


async def test_one_failing_input_costs_the_others_nothing(model: TTAChatModel, alone: list[str]) -> None:
    asked = [*QUESTIONS[:2], " ", *QUESTIONS[2:]]
    found = {index: answer async for index, answer in model.abatch_as_completed(asked, return_exceptions=True)}
    assert isinstance(found.pop(2), EmptyPromptError)
    assert [found[index].text for index in sorted(found)] == alone
    listed = await model.abatch(asked, return_exceptions=True)
    assert [type(answer) for answer in listed[:4]] == [AIMessage, AIMessage, EmptyPromptError, AIMessage]


@dataclass
class Before:
    """The tasks there were before a batch that ends early, and the tokens that had been decoded."""

    tasks: set[asyncio.Task[Any]]
    tokens: int

    @classmethod
    async def of(cls, model: TTAChatModel) -> Before:
        await model.ainvoke("Hello", max_new_tokens=1)
        return cls(asyncio.all_tasks(), stats(model).tokens)

    async def nothing_was_left(self, model: TTAChatModel) -> None:
        assert asyncio.all_tasks() <= self.tasks
        while stats(model).active or stats(model).queued:  # the decode thread drops them at its next step
            await checkpoint()
        assert stats(model).tokens - self.tokens < LONG * len(MIXED) / 2


async def test_leaving_a_closed_batch_stops_what_is_under_way(model: TTAChatModel) -> None:
    before = await Before.of(model)
    async with aclosing(model.abatch_as_completed(MIXED, max_new_tokens=LONG)) as answers:
        async for index, _ in answers:
            assert index == SHORT
            break
    await before.nothing_was_left(model)


@pytest.mark.parametrize("bound", [False, pytest.param(True, marks=pytest.mark.slow)])
async def test_a_break_alone_stops_what_is_under_way(model: TTAChatModel, bound: bool) -> None:
    before = await Before.of(model)
    runnable = model.bind(max_new_tokens=LONG) if bound else model.model_copy(update={"max_new_tokens": LONG})
    async for _ in runnable.abatch_as_completed(MIXED):
        break
    while closing := asyncio.all_tasks() - before.tasks:
        await asyncio.wait(closing)
    await before.nothing_was_left(model)


async def test_an_error_ends_the_others_of_its_batch(model: TTAChatModel) -> None:
    before = await Before.of(model)
    with pytest.raises(EmptyPromptError):
        await model.abatch([*MIXED, " "], max_new_tokens=LONG)
    await before.nothing_was_left(model)
