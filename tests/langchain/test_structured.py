"""Structured output: by a tool, and by an instruction for models that take none."""

from __future__ import annotations

import json
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.prompts import ChatPromptTemplate
from pydantic import BaseModel, Field, ValidationError

from tta_middleware import Policy, TTAChatModel
from tta_middleware.engines.scripted import ScriptedCall, ScriptedEngine
from tta_middleware.errors import ConfigurationError


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


async def test_a_model_without_tools_points_to_the_other_methods(model: TTAChatModel) -> None:
    with pytest.raises(ConfigurationError, match="method='json_schema'"):
        await model.with_structured_output(Person).ainvoke("Anna is 31.")


@pytest.mark.parametrize("settings", [{"method": "xml"}, {"strategy": "x"}, {"method": "json_mode", "tools": []}])
def test_settings_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"not 'xml'|not 'strategy'|not 'tools'"):
        answering("{}").with_structured_output(Person, **settings)
