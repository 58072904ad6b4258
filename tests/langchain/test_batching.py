"""Many requests at once through LangChain's own methods: they share the decode batch of one engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableConfig

from tta_middleware import TTAChatModel
from tta_middleware.chat_model.runtime import Runtime
from tta_middleware.engines.decoder import DecoderStats
from tta_middleware.engines.transformers import TransformersEngine

QUESTIONS = [f"Name {count} animals that live in the {place}." for count in (2, 3, 4) for place in ("sea", "wood")]
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


@pytest.mark.parametrize("ask", [by_abatch, by_abatch_as_completed, by_batch])
async def test_a_batch_decodes_side_by_side_and_answers_like_single_calls(
    model: TTAChatModel, alone: list[str], ask: Ask
) -> None:
    shared, answers = await sequences_a_step(model, ask, {"max_concurrency": len(QUESTIONS)})
    assert shared > 1.5
    assert answers == alone


async def test_max_concurrency_bounds_how_many_decode_at_once(model: TTAChatModel, alone: list[str]) -> None:
    one_by_one, answers = await sequences_a_step(model, by_abatch, {"max_concurrency": 1})
    assert one_by_one == pytest.approx(1.0)
    assert answers == alone


async def test_an_error_of_one_input_can_be_had_as_its_answer(model: TTAChatModel) -> None:
    asked = ["Name an animal.", " ", "Name a plant."]
    found = {index: answer async for index, answer in model.abatch_as_completed(asked, return_exceptions=True)}
    assert [type(found[index]).__name__ for index in range(3)] == ["AIMessage", "EmptyPromptError", "AIMessage"]
