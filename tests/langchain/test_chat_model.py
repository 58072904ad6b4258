"""TTAChatModel inside real LangChain, on the embedded model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import anyio
import pytest
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun
from langchain_core.messages import AIMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField, RunnableLambda
from pydantic import ValidationError

from tta_middleware import TSA, Budget, Policy, TTAChatModel
from tta_middleware.chat_model.messages import from_langchain
from tta_middleware.errors import ConfigurationError, EmptyPromptError, ModelNotFoundError
from tta_middleware.policy.file import PolicyFile
from tta_middleware.testing.scripted_engine import ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator

QUESTION = "What is the capital of France?"


async def test_every_way_to_ask_gives_the_same_answer(model: TTAChatModel) -> None:
    asked = await model.ainvoke(QUESTION)
    streamed = reduce(add, [chunk async for chunk in model.astream(QUESTION)])
    batched = await model.abatch([QUESTION])
    text = asked.text
    assert "Paris" in text
    assert streamed.text == text
    assert batched[0].text == text
    # In threads, since the sync API blocks; inside a running loop, since notebooks do that.
    assert (await asyncio.to_thread(model.invoke, QUESTION)).text == text
    assert model.invoke(QUESTION).text == text
    assert reduce(add, model.stream(QUESTION)).text == text
    assert model.batch([QUESTION])[0].text == text


async def test_the_answer_tells_its_story(model: TTAChatModel) -> None:
    message = await model.ainvoke(QUESTION)
    story = message.response_metadata["tta"]
    assert message.response_metadata["model_name"] == "smollm2"
    assert message.response_metadata["finish_reason"] in ("stop", "length")
    assert story["outcome"] == "clean"
    assert story["generations"] == story["moderation_calls"] == 1
    assert 0.0 <= story["baseline"]["score"] < 0.5
    assert message.usage_metadata is not None
    assert message.usage_metadata["output_tokens"] == story["generated_tokens"] <= 12
    assert message.usage_metadata["input_tokens"] > len(QUESTION.split())


async def test_streamed_metadata_survives_the_merge(model: TTAChatModel) -> None:
    streamed = reduce(add, [chunk async for chunk in model.astream(QUESTION)])
    asked = await model.ainvoke(QUESTION)
    assert streamed.response_metadata["finish_reason"] == asked.response_metadata["finish_reason"]
    assert streamed.usage_metadata == asked.usage_metadata


async def test_in_a_chain(model: TTAChatModel) -> None:
    prompt = ChatPromptTemplate.from_messages([("system", "You are terse."), ("user", "{question}")])
    chain = prompt | model | StrOutputParser()
    assert "Paris" in await chain.ainvoke({"question": QUESTION})


async def test_system_messages_and_history_reach_the_model(model: TTAChatModel) -> None:
    history = [
        HumanMessage("My dog is called Rex."),
        AIMessage("Rex is a nice name for a dog!"),
        HumanMessage("What is the name of my dog?"),
    ]
    assert "Rex" in (await model.ainvoke(history)).text
    named = [SystemMessage("You are a helpful AI assistant named Zork, trained by Acme."), HumanMessage("Who are you?")]
    assert "Zork" in (await model.ainvoke(named)).text


async def test_stop_ends_the_text_before_the_stop_string(model: TTAChatModel) -> None:
    plain = (await model.ainvoke(QUESTION)).text
    stop = plain.split()[2]
    stopped = await model.ainvoke(QUESTION, stop=[stop])
    assert plain.startswith(stopped.text)
    assert stop not in stopped.text
    assert stopped.response_metadata["finish_reason"] == "stop"


@pytest.mark.slow
async def test_a_seed_repeats_a_sampled_answer(model: TTAChatModel) -> None:
    ask = model.bind(temperature=1.2, seed=3)
    first, again = await ask.ainvoke("Invent a word."), await ask.ainvoke("Invent a word.")
    other = await model.bind(temperature=1.2, seed=4).ainvoke("Invent a word.")
    assert first.text == again.text
    assert first.text != other.text


async def test_a_policy_of_one_call_changes_nothing_else(model: TTAChatModel) -> None:
    strict = await model.ainvoke(QUESTION, policy=0.0, method="none")
    assert strict.text == Policy().notice
    assert strict.response_metadata["finish_reason"] == "content_filter"
    assert strict.response_metadata["tta"]["outcome"] == "blocked"
    assert (await model.ainvoke(QUESTION)).response_metadata["tta"]["outcome"] == "clean"


async def test_the_policy_can_be_configured_while_the_model_stays_loaded(model: TTAChatModel) -> None:
    model.method = "none"
    configurable = model.configurable_fields(policy=ConfigurableField(id="policy"))
    blocked = await configurable.ainvoke(QUESTION, config={"configurable": {"policy": Policy(threshold=0.0)}})
    assert blocked.response_metadata["finish_reason"] == "content_filter"
    assert len(model.runtime._engines) == 1


async def test_named_policies_are_chosen_per_request_and_reloaded(model: TTAChatModel, tmp_path: Path) -> None:
    file = tmp_path / "policies.toml"
    file.write_text("[policies.default]\nthreshold = 1.0\n[policies.strict]\nthreshold = 0.0\n")
    named = TTAChatModel(
        model="smollm2", dtype="float32", max_new_tokens=2, method="none", policies=PolicyFile(file),
        runtime=model.runtime,
    )  # fmt: skip
    chain = named.configurable_fields(policy=ConfigurableField(id="policy"))
    strict: Any = {"configurable": {"policy": "strict"}}
    assert (await chain.ainvoke(QUESTION)).text != Policy().notice
    assert (await chain.ainvoke(QUESTION, config=strict)).text == Policy().notice
    file.write_text("[policies.default]\nthreshold = 0.0\nnotice = 'Not today.'\n[policies.strict]\nthreshold = 1.0\n")
    assert (await chain.ainvoke(QUESTION)).text == "Not today."
    assert (await chain.ainvoke(QUESTION, config=strict)).text != Policy().notice
    with pytest.raises(ConfigurationError, match=r"no policy 'strikt'.*did you mean 'strict'"):
        await named.ainvoke(QUESTION, policy="strikt")


@pytest.mark.slow
async def test_a_bound_method_and_budget_are_used(model: TTAChatModel) -> None:
    answer = await model.ainvoke(QUESTION, policy=0.0, method=TSA(probes=2), budget=Budget(generations=3))
    story = answer.response_metadata["tta"]
    assert (story["method"], story["stop_reason"], story["generations"]) == ("tsa", "budget: generations", 3)


async def test_a_runnable_falls_back_and_is_moderated_too(model: TTAChatModel) -> None:
    fallback = RunnableLambda(lambda messages: "Name a colour.") | model
    guarded = TTAChatModel(
        model="smollm2", dtype="float32", max_new_tokens=2, policy=0.0, method="none",
        fallback=fallback, runtime=model.runtime,
    )  # fmt: skip
    message = await guarded.ainvoke(QUESTION)
    # Nothing passes a threshold of 0, the fallback's own words included.
    assert message.text == Policy().notice
    assert message.response_metadata["tta"]["moderation_calls"] == 2


def test_content_blocks_become_text() -> None:
    blocks: list[str | dict[str, Any]] = [
        {"type": "text", "text": "one "},
        "two",
        {"type": "reasoning", "reasoning": "x"},
    ]
    turns = from_langchain([HumanMessage(blocks), ToolMessage("42", tool_call_id="1"), ChatMessage("3", role="user")])
    assert [(turn.role, turn.content) for turn in turns] == [("user", "one two"), ("tool", "42"), ("user", "3")]


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([HumanMessage([{"type": "image_url", "image_url": {"url": "data:"}}])], "image_url"),
        ([ChatMessage("hello", role="narrator")], "ChatMessage"),
    ],
)
def test_what_a_text_model_cannot_read_is_named(messages: list[Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        from_langchain(messages)


@pytest.mark.parametrize("prompt", ["", "   "])
async def test_an_empty_prompt_is_refused(model: TTAChatModel, prompt: str) -> None:
    with pytest.raises(EmptyPromptError):
        await model.ainvoke(prompt)


async def test_instructions_alone_are_answered_and_an_instruction_of_ours_is_none() -> None:
    told = TTAChatModel(model=ScriptedEngine(lambda call: f"You said {call.text}"), moderator=ScriptedModerator())
    assert (await told.ainvoke([SystemMessage("Greet the reader.")])).text == "You said Greet the reader."
    assert told.invoke([ChatMessage(role="developer", content="Greet.")]).text == "You said Greet."
    asked = told.bind(response_format={"type": "json_object"})
    assert (await asked.ainvoke([SystemMessage("Greet.")])).text.startswith("You said Greet.")
    with pytest.raises(EmptyPromptError):
        await asked.ainvoke([AIMessage("Hello.")])


async def test_a_missing_model_says_which_command_brings_it() -> None:
    with pytest.raises(ModelNotFoundError, match="smollm2"):
        await TTAChatModel(model="smollm3").ainvoke("hello")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"policy": 1.2}, "less than or equal to 1"),
        ({"policy": {"violent": 0.2}}, "did you mean 'violence"),
        ({"policy": {"treshold": 0.2}}, "did you mean 'threshold'"),
        ({"policy": "strict"}, "set policies="),
        ({"policies": "nowhere.toml"}, "cannot read nowhere.toml"),
        ({"method": "gradient"}, "unknown method 'gradient'"),
        ({"moderator": "perspective"}, "unknown moderator 'perspective'"),
        ({"max_new_tokens": 0}, "greater than or equal to 1"),
        ({"temperature": -1.0}, "greater than or equal to 0"),
        ({"top_p": 0.0}, "greater than 0"),
        ({"budget": {"generations": 0}}, "greater than 0"),
        ({"fallback": "shrug"}, "fallback"),
        ({"release": "word"}, "'end'"),
    ],
)
def test_settings_are_checked_at_construction(settings: dict[str, Any], says: str) -> None:
    with pytest.raises((ValidationError, ConfigurationError), match=says):
        TTAChatModel(**settings)


async def test_an_unknown_call_setting_is_named(model: TTAChatModel) -> None:
    with pytest.raises(ConfigurationError, match="temprature"):
        await model.ainvoke(QUESTION, temprature=0.3)


async def test_a_stream_ends_with_the_task_that_reads_it_even_if_nobody_closes_it() -> None:
    """LangChain hands a run manager over where one task reads to the end; it leaves the generator as it is then."""
    engine = ScriptedEngine("word " * 10_000, step_seconds=0.0005)
    chat = TTAChatModel(model=engine, moderator=ScriptedModerator(), max_new_tokens=10_000)
    before, kept = asyncio.all_tasks(), []

    async def read() -> None:
        run = AsyncCallbackManagerForLLMRun.get_noop_manager()
        kept.append(chat._astream([HumanMessage(QUESTION)], run_manager=run))
        await anext(kept[0])

    await asyncio.create_task(read())
    await until(lambda: asyncio.all_tasks() == before)
    steps = engine.steps
    await anyio.sleep(0.02)
    assert engine.steps == steps
    await kept[0].aclose()


async def until(true: Callable[[], bool]) -> None:
    with anyio.fail_after(10.0):
        while not true():  # noqa: ASYNC110
            await anyio.sleep(0.001)
