"""Structured output without tools: an instruction with the schema, a parser, and what a repair has to give it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from operator import add
from typing import Any, TypeAlias, is_typeddict

from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import BaseMessage, ChatMessage, HumanMessage, SystemMessage
from langchain_core.output_parsers import (
    BaseCumulativeTransformOutputParser,
    BaseOutputParser,
    JsonOutputParser,
    PydanticOutputParser,
)
from langchain_core.outputs import ChatGeneration, Generation
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda, RunnableMap
from langchain_core.utils.function_calling import convert_to_json_schema
from langchain_core.utils.json import parse_json_markdown
from langchain_core.utils.pydantic import is_basemodel_subclass

from tta_middleware.errors import ConfigurationError
from tta_middleware.guard.quality import QualityGate, goes_round
from tta_middleware.protocols import Engine
from tta_middleware.types import Completion, FinishReason, PromptEmbeddings, QualityReport

Schema: TypeAlias = dict[str, Any] | type

_INSTRUCTION = "Answer with one JSON object and nothing else: no introduction, no code fence, no comment."
_BEGINNINGS = ("{", "[", "```")
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
    wanted: dict[str, Any] = {"type": "json_object"}
    if method == "json_schema" and schema is not None:
        wanted = {"type": "json_schema", "json_schema": {"schema": convert_to_json_schema(schema)}}
    about = {"kwargs": {"method": method}, "schema": schema}
    asked = model.bind(response_format=wanted, ls_structured_output_format=about)
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


class _ReadsAll(BaseCumulativeTransformOutputParser[Any]):
    """A parser whose streams end with the error that a whole answer gives; LangChain's own end without a word."""

    def _transform(self, input: Iterator[str | BaseMessage]) -> Iterator[Any]:  # noqa: A002 - LangChain's name
        seen: list[Any] = []
        yield from super()._transform(_noting(input, seen))
        self._read(seen)

    async def _atransform(self, input: AsyncIterator[str | BaseMessage]) -> AsyncIterator[Any]:  # noqa: A002
        seen: list[Any] = []

        async def noting() -> AsyncIterator[str | BaseMessage]:
            async for piece in input:
                seen.append(piece)
                yield piece

        async for parsed in super()._atransform(noting()):
            yield parsed
        self._read(seen)

    def _read(self, pieces: Sequence[Any]) -> None:
        """Meet the error of the whole; within this run, since a run of its own would be told to sync callbacks."""
        if pieces:
            whole = reduce(add, pieces)
            message = isinstance(whole, BaseMessage)
            self.parse_result([ChatGeneration(message=whole) if message else Generation(text=whole)])


def _noting(pieces: Iterator[Any], seen: list[Any]) -> Iterator[Any]:
    for piece in pieces:
        seen.append(piece)
        yield piece


# mypy's plugin of pydantic does not find the type variable that a field of both has.
_Json: Any = JsonOutputParser
_Instance: Any = PydanticOutputParser


class _ReadsInstance(_ReadsAll, _Instance):  # type: ignore[misc]
    """Into instances of a pydantic class."""


class _ReadsJson(_ReadsAll, _Json):  # type: ignore[misc]
    """Into what JSON says."""


def _parser(schema: Schema | None) -> BaseOutputParser[Any]:
    if isinstance(schema, type) and is_basemodel_subclass(schema):
        return _ReadsInstance(pydantic_object=schema)
    return _ReadsJson()


def _with_raw(asked: Runnable[Any, Any], parser: BaseOutputParser[Any]) -> Runnable[Any, Any]:
    """A dict of ``raw``, ``parsed`` and ``parsing_error``, as LangChain's own, which streams come to, too."""

    def read(told: dict[str, Any], config: RunnableConfig) -> dict[str, Any]:
        try:
            return {**told, "parsed": parser.invoke(told["raw"], config), "parsing_error": None}
        except Exception as error:  # noqa: BLE001 - the caller asked for it as a value
            return {**told, "parsed": None, "parsing_error": error}

    return RunnableMap(raw=asked) | RunnableLambda(read)


def _instructed(instruction: str, asked: Sequence[BaseMessage]) -> list[BaseMessage]:
    """The conversation with the instruction at the end of its system message; one that asks nothing stays as it is."""
    if not any(isinstance(turn, SystemMessage | HumanMessage | ChatMessage) for turn in asked):
        return list(asked)
    if asked and isinstance(asked[0], SystemMessage):
        return [SystemMessage(f"{asked[0].text}\n\n{instruction}"), *asked[1:]]
    return [SystemMessage(instruction), *asked]


def asks_for_json(wanted: Any) -> bool:
    """Whether a ``response_format`` that :func:`with_response_format` takes asks for JSON."""
    return wanted is not None and wanted != {"type": "text"}


@dataclass(frozen=True, slots=True)
class JsonQuality:
    """Whether an answer that is to be JSON is usable: it parses, says something, has no loop for a text, is fluent.

    The other text checks are for prose. Of an answer that is not over some JSON has to have begun.
    """

    gate: QualityGate = field(default_factory=QualityGate)

    async def assess(
        self, engine: Engine, prompt: PromptEmbeddings, completions: Sequence[Completion]
    ) -> list[QualityReport]:
        """See :class:`tta_middleware.protocols.Quality`; the JSON may have begun in what ``prompt`` ends with."""
        found = [self._problems(prompt.assistant_prefix + done.text, done.finish_reason) for done in completions]
        read = [done for done, problems in zip(completions, found, strict=True) if not problems]
        fluent = iter(await self.fluency(engine, prompt, read))
        return [QualityReport(problems) if problems else next(fluent) for problems in found]

    async def fluency(
        self, engine: Engine, prompt: PromptEmbeddings, completions: Sequence[Completion]
    ) -> list[QualityReport]:
        """See :meth:`tta_middleware.guard.quality.QualityGate.fluency`."""
        return await self.gate.fluency(engine, prompt, completions)

    def _problems(self, text: str, reason: FinishReason) -> tuple[str, ...]:
        if reason == "aborted":
            return () if any(mark in text for mark in _BEGINNINGS) else ("no_json",)
        try:
            values = list(_values(parse_json_markdown(text, parser=partial(json.loads, strict=False))))
        except (ValueError, RecursionError):
            return ("broken_json",)
        if not values:
            return ("empty",)
        return self.repetition(values)

    def repetition(self, read: Any) -> tuple[str, ...]:
        """``repetition`` where one of the texts in plain values goes round, unless the gate's bounds allow that."""
        loops = any(isinstance(value, str) and goes_round(value) for value in _values(read))
        return ("repetition",) if loops and self.gate.bounds.max_repeated_share < 1.0 else ()


def _values(read: Any) -> Iterator[Any]:
    """All that JSON says: its numbers, truth values and texts that are not blank."""
    if isinstance(read, Mapping):
        read = list(read.values())
    if isinstance(read, list):
        for part in read:
            yield from _values(part)
    elif read is not None and not (isinstance(read, str) and not read.strip()):
        yield read
