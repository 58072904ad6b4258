"""Structured output: by a tool, and by an instruction for models that take none."""

from __future__ import annotations

import json
from typing import Annotated, Any, TypedDict

import pytest
from langchain.agents import create_agent
from langchain.agents.structured_output import AutoStrategy, ProviderStrategy, ToolStrategy
from langchain_core.exceptions import ModelRefusalError, OutputParserException
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.output_parsers import JsonOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from pydantic import BaseModel, Field, ValidationError

from tta_middleware import Policy, TTAChatModel, Windows
from tta_middleware.errors import ConfigurationError
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator


class Person(BaseModel):
    """A person."""

    name: str = Field(description="first name")
    age: int = Field(ge=0)


class PersonDict(TypedDict):
    """A person."""

    name: Annotated[str, ..., "first name"]
    age: Annotated[int, ..., "in years"]


SCHEMA: dict[str, Any] = {**Person.model_json_schema(), "title": "person", "description": "A person."}
ANNA = {"name": "Anna", "age": 31}
METHODS = ("function_calling", "json_schema", "json_mode")


def answering(value: str) -> TTAChatModel:
    """A model that writes ``value`` as the arguments of the tool that it must call, or as its whole answer."""

    def script(call: ScriptedCall) -> str:
        return f" {value}}}\n</tool_call>" if call.prefix else value

    return TTAChatModel(model=ScriptedEngine(script), method="none", policy=0.99)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("schema", [Person, PersonDict, SCHEMA])
async def test_an_answer_is_an_instance_of_the_schema(schema: Any, method: str) -> None:
    structured = answering(json.dumps(ANNA)).with_structured_output(schema, method=method)
    expected = Person(**ANNA) if schema is Person else ANNA
    assert await structured.ainvoke("Who is Anna?") == expected
    assert structured.invoke("Who is Anna?") == expected
    assert [part async for part in structured.astream("Who is Anna?")][-1] == expected


@pytest.mark.parametrize("method", METHODS)
async def test_the_raw_message_comes_along(method: str) -> None:
    structured = answering(json.dumps(ANNA)).with_structured_output(Person, method=method, include_raw=True)
    result: Any = await structured.ainvoke("Who is Anna?")
    assert (result["parsed"], result["parsing_error"]) == (Person(**ANNA), None)
    assert result["raw"].response_metadata["tta"]["outcome"] == "clean"


@pytest.mark.parametrize("method", METHODS)
async def test_what_does_not_fit_the_schema_raises_or_is_reported(method: str) -> None:
    model = answering('{"name": "Anna", "age": -3}')
    with pytest.raises((OutputParserException, ValidationError)):
        await model.with_structured_output(Person, method=method).ainvoke("Who is Anna?")
    result: Any = await model.with_structured_output(Person, method=method, include_raw=True).ainvoke("Who is Anna?")
    assert result["parsed"] is None
    assert isinstance(result["parsing_error"], OutputParserException | ValidationError)


@pytest.mark.parametrize("method", ["json_schema", "json_mode"])
async def test_prose_instead_of_json_raises(method: str) -> None:
    with pytest.raises(OutputParserException):
        await answering("Anna is 31.").with_structured_output(PersonDict, method=method).ainvoke("Who is Anna?")


@pytest.mark.parametrize("method", ["json_schema", "json_mode"])
@pytest.mark.parametrize("value", ['{"name": "Anna"}', "Anna is 31 years old."])
async def test_a_stream_of_what_does_not_fit_ends_with_an_error(method: str, value: str) -> None:
    asked = answering(value).with_structured_output(Person, method=method)
    with pytest.raises(OutputParserException):
        list(asked.stream("Who is she?"))
    with pytest.raises(OutputParserException):
        [one async for one in asked.astream("Who is she?")]
    told = answering(value).with_structured_output(Person, method=method, include_raw=True)
    [error] = [one["parsing_error"] for one in told.stream("Who is she?") if one.get("parsing_error")]
    assert isinstance(error, OutputParserException)


async def test_a_stream_of_what_fits_ends_with_the_instance() -> None:
    asked = answering(json.dumps(ANNA)).with_structured_output(Person, method="json_schema")
    assert list(asked.stream("Who is she?"))[-1] == Person(**ANNA)
    assert [one async for one in asked.astream("Who is she?")][-1] == Person(**ANNA)


async def test_a_code_fence_is_read() -> None:
    fenced = f"Here it is:\n```json\n{json.dumps(ANNA)}\n```"
    assert await answering(fenced).with_structured_output(Person, method="json_schema").ainvoke("Who?") == Person(
        **ANNA
    )


async def test_the_instruction_joins_the_system_message_and_holds_the_schema() -> None:
    seen: list[str] = []

    def script(call: ScriptedCall) -> str:
        seen.append(call.conversation)
        return json.dumps(ANNA)

    model = TTAChatModel(model=ScriptedEngine(script), method="none", policy=0.99)
    structured = model.with_structured_output(Person, method="json_schema")
    await structured.ainvoke([SystemMessage("Be brief."), HumanMessage("Who is Anna?")])
    await (ChatPromptTemplate.from_messages([("user", "{q}")]) | structured).ainvoke({"q": "Who is Anna?"})
    assert seen[0].startswith("<|system|>Be brief.\n\nAnswer with one JSON object")
    assert '"first name"' in seen[0]
    assert seen[0].count("<|system|>") == seen[1].count("<|system|>") == 1
    assert seen[1].endswith("<|user|>Who is Anna?")
    await model.with_structured_output(Person, method="json_mode").ainvoke("Who is Anna?")
    assert "first name" not in seen[2]


async def test_a_blocked_answer_is_no_instance() -> None:
    model = TTAChatModel(model=ScriptedEngine(' {"name": "A", "age": 1}}'), method="none", policy=Policy(threshold=0.0))
    structured = model.with_structured_output(Person, include_raw=True)
    result: Any = await structured.ainvoke("Who is Anna?")
    assert result["parsed"] is None
    assert result["raw"].text == Policy().notice


LATE = json.dumps({"name": "Anna", "said": "a calm word about the roses and the bees that visit them, then flagme"})


async def asks_a_librarian(_: object) -> str:
    return "Please ask a librarian."


@pytest.mark.parametrize("fallback", ["refuse", asks_a_librarian], ids=["notice", "words of a function"])
@pytest.mark.parametrize("method", ["json_schema", "json_mode"])
async def test_what_stands_in_for_the_rest_of_json_is_no_part_of_it(method: str, fallback: Any) -> None:
    """A parser of JSON that comes in pieces would take it for the end of a string."""
    model = TTAChatModel(
        model=ScriptedEngine(LATE),
        moderator=ScriptedModerator(),
        method="none",
        windows=Windows(first=16, largest=16),
        fallback=fallback,
    )
    stream = model.with_structured_output(PersonDict, method=method).astream("Anna?")
    parts = [await anext(stream), await anext(stream)]
    with pytest.raises(ModelRefusalError, match="librarian" if callable(fallback) else Policy().notice):
        parts += [part async for part in stream]
    assert parts[-1]["name"] == "Anna"
    chain = model | JsonOutputParser()  # by which nobody tells the model what is wanted
    with pytest.raises(ModelRefusalError):
        assert [part async for part in chain.astream("Anna?")]
    said = "".join([chunk.text async for chunk in model.astream("Anna?")])
    assert LATE.startswith(said)
    assert len(said) > 32


REPAIRS = {
    "prose": ("I would rather not say who that is.", "blocked"),
    "half of it": ('{"name": "Anna", "age": ', "blocked"),
    "numbers": ('{"a": 1, "b": [2, 3, 4]}', "neutralised"),
    "nothing": ('{"name": " ", "friends": [null, {}]}', "blocked"),
    "a loop": (json.dumps({"name": "Anna of the red house by the river, " * 6, "age": 31}), "blocked"),
    "beyond all depth": ("[" * 1500, "blocked"),
    "no": ('{"known": false}', "neutralised"),
    "like lines": (
        json.dumps([{"name": name, "home": "a red house"} for name in ("Anna", "Ben", "Cara", "Dan", "Eve")]),
        "neutralised",
    ),
    "fenced": ('Here it is:\n```json\n{"name": "Anna", "age": 31}\n```', "neutralised"),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("repair", "outcome"), REPAIRS.values(), ids=REPAIRS)
async def test_a_repair_of_json_is_json(repair: str, outcome: str, stream: bool) -> None:
    engine = ScriptedEngine(lambda call: repair if call.moved else '{"name": "flagme"}')
    settings: dict[str, Any] = {"budget": {"generations": 4}, "max_new_tokens": 4000}
    model = TTAChatModel(model=engine, moderator=ScriptedModerator(), method="noise", **settings)
    asked = model.bind(response_format={"type": "json_object"})
    message: Any = None
    async for chunk in asked.astream("Who is Anna?"):
        message = chunk if message is None else message + chunk
    message = message if stream else await asked.ainvoke("Who is Anna?")
    assert message.response_metadata["tta"]["outcome"] == outcome
    # Of a long one that is found wanting at its end a part has left in a stream.
    left = stream and message.text.startswith(repair[: Windows().first])
    assert left or message.text == (repair if outcome == "neutralised" else Policy().notice)


async def test_a_model_without_tools_points_to_the_other_methods(model: TTAChatModel) -> None:
    with pytest.raises(ConfigurationError, match="method='json_schema'"):
        await model.with_structured_output(Person).ainvoke("Anna is 31.")


@pytest.mark.parametrize("settings", [{"method": "xml"}, {"strategy": "x"}, {"method": "json_mode", "tools": []}])
def test_settings_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"not 'xml'|not 'strategy'|not 'tools'"):
        answering("{}").with_structured_output(Person, **settings)


FORMATS: dict[str, Any] = {
    "json_schema": {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}},
    "pydantic": Person,
    "TypedDict": PersonDict,
    "json_object": {"type": "json_object"},
}


@pytest.mark.parametrize("wanted", FORMATS.values(), ids=FORMATS.keys())
async def test_a_response_format_is_told_to_the_model(wanted: Any) -> None:
    seen: list[str] = []

    def script(call: ScriptedCall) -> str:
        seen.append(call.conversation)
        return json.dumps(ANNA)

    model = TTAChatModel(model=ScriptedEngine(script), method="none", policy=0.99)
    assert json.loads((await model.ainvoke("Who is Anna?", response_format=wanted)).text) == ANNA
    assert "one JSON object" in seen[0]
    assert ("in years" in seen[0] or '"minimum": 0' in seen[0]) == (wanted is not FORMATS["json_object"])
    assert await model.ainvoke("Who is Anna?", response_format={"type": "text"})
    assert "JSON" not in seen[-1]


@pytest.mark.parametrize("wanted", ["json", {"type": "grammar"}, {"type": "json_schema"}, int])
async def test_another_response_format_is_refused_with_what_to_use(wanted: Any) -> None:
    with pytest.raises(ConfigurationError, match="with_structured_output"):
        await answering("{}").ainvoke("Who is Anna?", response_format=wanted)


@pytest.mark.parametrize("strategy", [Person, AutoStrategy(Person), ToolStrategy(Person), ProviderStrategy(Person)])
async def test_an_agent_answers_in_a_schema_by_whatever_strategy(strategy: Any) -> None:
    def script(call: ScriptedCall) -> str:
        arguments = f" {json.dumps(ANNA)}}}\n</tool_call>"
        if "<|tools|>" not in call.conversation:
            return json.dumps(ANNA)
        return arguments if call.prefix.endswith('"arguments":') else f'{{"name": "Person", "arguments":{arguments}'

    agent = create_agent(
        TTAChatModel(model=ScriptedEngine(script), method="none", policy=0.99), response_format=strategy
    )
    asked: Any = {"messages": [("user", "Who is Anna?")]}
    assert (await agent.ainvoke(asked))["structured_response"] == Person(**ANNA)
    assert agent.invoke(asked)["structured_response"] == Person(**ANNA)


async def test_an_agent_with_tools_and_a_providers_strategy_calls_first() -> None:
    def script(call: ScriptedCall) -> str:
        if "<|tool|>" in call.conversation:
            return json.dumps(ANNA)
        return '<tool_call>{"name": "look_up", "arguments": {"name": "Anna"}}</tool_call>'

    @tool
    def look_up(name: str) -> str:
        """Look a person up."""
        return "She is 31."

    model = TTAChatModel(model=ScriptedEngine(script), method="none", policy=0.99)
    agent = create_agent(model, [look_up], response_format=ProviderStrategy(Person))
    asked: Any = {"messages": [("user", "Who is Anna?")]}
    assert (await agent.ainvoke(asked))["structured_response"] == Person(**ANNA)
