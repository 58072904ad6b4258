"""Structured output without tools: an instruction with the schema, and a parser."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, TypeAlias, is_typeddict

from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import BaseMessage, SystemMessage, convert_to_messages
from langchain_core.output_parsers import BaseOutputParser, JsonOutputParser, PydanticOutputParser
from langchain_core.prompt_values import ChatPromptValue, PromptValue, StringPromptValue
from langchain_core.runnables import Runnable, RunnableLambda, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema
from langchain_core.utils.pydantic import is_basemodel_subclass

from tta_middleware.errors import ConfigurationError

Schema: TypeAlias = dict[str, Any] | type

_INSTRUCTION = "Answer with one JSON object and nothing else: no introduction, no code fence, no comment."
_WITH_SCHEMA = "It must match this JSON schema:\n{schema}"


def json_output(
    model: BaseChatModel, schema: Schema | None, *, method: str, include_raw: bool
) -> Runnable[LanguageModelInput, Any]:
    """A runnable that asks for JSON and parses it; the model is not constrained, so parsing may fail.

    ``json_schema`` tells the model the schema; with ``json_mode`` the caller's prompt has to say what is wanted.

    Raises:
        ConfigurationError: ``json_schema`` without a schema, or an unknown method.
    """
    if method not in ("json_schema", "json_mode"):
        raise ConfigurationError(f"method is function_calling, json_schema or json_mode, not {method!r:.40}")
    if method == "json_schema" and schema is None:
        raise ConfigurationError("with_structured_output(method='json_schema') needs a schema")
    told = schema if method == "json_schema" else None
    instruction = _instruction(None if told is None else convert_to_json_schema(told))
    bound = model.bind(ls_structured_output_format={"kwargs": {"method": method}, "schema": schema})
    asked = RunnableLambda(partial(_instructed, instruction)) | bound
    return _with_raw(asked, _parser(schema)) if include_raw else asked | _parser(schema)


def with_response_format(messages: Sequence[BaseMessage], wanted: Any) -> list[BaseMessage]:
    """The conversation with what ``response_format``, as OpenAI's models take it, says of the answer.

    It may be a schema as well. The answer comes as text, which whoever asked for it parses.

    Raises:
        ConfigurationError: another form than these.
    """
    match wanted:
        case None | {"type": "text"}:
            return list(messages)
        case {"type": "json_object"}:
            return _instructed(_instruction(None), list(messages))
        case {"type": "json_schema", "json_schema": {"schema": Mapping() as schema}}:
            return _instructed(_instruction(schema), list(messages))
        case type() if is_basemodel_subclass(wanted) or is_typeddict(wanted):
            return _instructed(_instruction(convert_to_json_schema(wanted)), list(messages))
    raise ConfigurationError(
        'response_format is {"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": ...}}, '
        "a pydantic class or a TypedDict class; with_structured_output(schema, method='json_schema') takes any schema "
        "and parses the answer, too"
    )


def _instruction(schema: Mapping[str, Any] | None) -> str:
    return _INSTRUCTION if schema is None else f"{_INSTRUCTION} {_WITH_SCHEMA.format(schema=json.dumps(schema))}"


def _parser(schema: Schema | None) -> BaseOutputParser[Any]:
    if isinstance(schema, type) and is_basemodel_subclass(schema):
        return PydanticOutputParser(pydantic_object=schema)
    return JsonOutputParser()


def _with_raw(asked: Runnable[Any, Any], parser: BaseOutputParser[Any]) -> Runnable[Any, Any]:
    """A dict of ``raw``, ``parsed`` and ``parsing_error``, as LangChain's own."""
    parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=asked) | parsed.with_fallbacks([failed], exception_key="parsing_error")


def _instructed(instruction: str, asked: LanguageModelInput) -> list[BaseMessage]:
    """The conversation with the instruction at the end of its system message."""
    messages = _messages(asked)
    if messages and isinstance(messages[0], SystemMessage):
        return [SystemMessage(f"{messages[0].text}\n\n{instruction}"), *messages[1:]]
    return [SystemMessage(instruction), *messages]


def _messages(asked: LanguageModelInput) -> Sequence[BaseMessage]:
    if isinstance(asked, str):
        asked = StringPromptValue(text=asked)
    value = asked if isinstance(asked, PromptValue) else ChatPromptValue(messages=convert_to_messages(asked))
    return value.to_messages()
