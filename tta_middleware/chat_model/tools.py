"""One request with tools: what the model is shown, how it is made to call, and when a repaired call is usable."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool

from tta_middleware.chat_model.structured import JsonQuality
from tta_middleware.chat_model.tool_parsing import BrokenCall, ParsedCall, opening, tool_parser
from tta_middleware.errors import ConfigurationError
from tta_middleware.guard.quality import QualityGate
from tta_middleware.guard.settings import BRIDGES
from tta_middleware.protocols import Engine, ToolEngine
from tta_middleware.types import Completion, Message, PromptEmbeddings, QualityReport, ToolFormat

Tool: TypeAlias = dict[str, Any] | type | Callable[..., Any] | BaseTool
ToolChoice: TypeAlias = str | bool | dict[str, Any] | None


def describe(tools: Sequence[Tool], *, strict: bool | None = None) -> list[dict[str, Any]]:
    """Tools of any kind that LangChain knows, in OpenAI's form.

    Raises:
        ConfigurationError: this is no list of tools, or one of them cannot be described.
    """
    given: object = tools
    if not isinstance(given, Iterable) or isinstance(given, str | Mapping):
        raise ConfigurationError(f"tools is a list, such as [opening_hours], not {type(given).__name__}")
    return [_described(tool, strict) for tool in tools]


def _described(tool: Tool, strict: bool | None) -> dict[str, Any]:
    try:
        described = convert_to_openai_tool(tool, strict=strict)
        tool_names([described])
    except (KeyError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise ConfigurationError(
            f"a tool is a function, a class, a LangChain tool or a description in OpenAI's form, with its name; "
            f"{tool!r:.60} cannot be read as one: {type(error).__name__}: {why}"
        ) from None
    return described


def tool_names(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    return [str(tool["function"]["name"]) for tool in tools]


def resolve_tool_choice(choice: ToolChoice, names: Sequence[str]) -> str:
    """``auto``, ``any``, ``none``, or the name of the tool that must be called.

    Raises:
        ConfigurationError: no tool has that name, or there is none to choose from.
    """
    if isinstance(choice, dict):
        function = choice.get("function")
        named = function.get("name") if isinstance(function, dict) else None
        choice = named or choice.get("name") or choice.get("type")
    known = {None: "auto", False: "auto", True: "any", "required": "any"}
    plain = choice is None or isinstance(choice, str | bool)
    settled = known.get(choice, choice) if plain and choice not in names else choice
    if settled in ("auto", "none") or (settled == "any" and names) or settled in names:
        return cast(str, settled)
    listed = ", ".join(names) or "there are no tools"
    raise ConfigurationError(f"tool_choice is auto, any, none or a tool's name ({listed}), not {choice!r:.60}")


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of one request.

    Attributes:
        tools: descriptions in OpenAI's form, never empty.
        names: their names.
        kind: how the model writes a call.
        opening: what the answer is made to begin with, empty if the model may do as it likes.
        parallel: whether one answer may hold several calls; otherwise the first one is taken and the others are not.
    """

    tools: tuple[dict[str, Any], ...]
    names: tuple[str, ...]
    kind: ToolFormat
    opening: str = ""
    parallel: bool = True

    @staticmethod
    async def of(
        engine: Engine, given: Sequence[Tool], choice: ToolChoice, *, parallel: bool | None = None
    ) -> ToolUse | None:
        """How ``engine`` uses these tools; None if it does not.

        Raises:
            ConfigurationError: the model takes no tools, ``choice`` names none of them, or something is none of these.
        """
        if not isinstance(parallel, bool | None):
            raise ConfigurationError(f"parallel_tool_calls is True or False, not {parallel!r:.40}")
        tools = describe(given)
        names = tuple(tool_names(tools))
        settled = resolve_tool_choice(choice, names)
        if not tools or settled == "none":
            return None
        if not isinstance(engine, ToolEngine):
            raise ConfigurationError(f"the engine of {engine.model_id!r} has no tool_format(), so it takes no tools")
        kind = await engine.tool_format()
        named = _only(names) if settled == "any" else settled
        begin = "" if settled == "auto" else opening(kind, named)
        return ToolUse(tuple(tools), names, kind, begin, parallel is not False)


def _only(names: Sequence[str]) -> str | None:
    return names[0] if len(names) == 1 else None


@dataclass(frozen=True, slots=True)
class CallQuality:
    """Whether an answer with tools is usable: its calls can be carried out, or its text passes the usual gate.

    The text checks are for prose; a call with short arguments would fail them as symbols or repetition. So a call is
    none only where a text in its arguments goes round. A bridge leads prose elsewhere; inside a call it would be put
    into an argument, so there it is never usable.
    """

    use: ToolUse
    bridges: tuple[str, ...] = BRIDGES
    gate: QualityGate | JsonQuality = field(default_factory=QualityGate)

    async def assess(
        self, engine: Engine, prompt: PromptEmbeddings, completions: Sequence[Completion]
    ) -> list[QualityReport]:
        """See :class:`tta_middleware.protocols.Quality`; a call may have begun in what ``prompt`` ends with."""
        found = [self._problems(prompt.assistant_prefix, done) for done in completions]
        prose = [done for done, problems in zip(completions, found, strict=True) if problems is None]
        calls = [done for done, problems in zip(completions, found, strict=True) if problems == ()]
        as_prose = iter(await self.gate.assess(engine, prompt, prose))
        as_calls = iter(await self.gate.fluency(engine, prompt, calls))
        return [
            QualityReport(problems) if problems else next(as_prose if problems is None else as_calls)
            for problems in found
        ]

    def _problems(self, begun: str, done: Completion) -> tuple[str, ...] | None:
        """What is wrong with the calls; None where there are none and need be none."""
        parser = tool_parser(self.use.kind, self.use.names, self.use.tools)
        bridge = next((b for b in self.bridges if begun.endswith(b)), "")
        pieces = parser.feed(begun.removesuffix(bridge))
        if bridge and parser.open:
            return ("bridge_in_a_tool_call",)
        pieces += parser.feed(bridge + done.text.removeprefix(bridge))
        if parser.open and done.finish_reason == "aborted":
            return ()  # the beginning of a call
        pieces += parser.finish()
        if any(isinstance(piece, BrokenCall) for piece in pieces):
            return ("broken_tool_call",)
        calls = [piece for piece in pieces if isinstance(piece, ParsedCall)]
        if any(call.name not in self.use.names for call in calls):
            return ("unknown_tool",)
        if not calls:
            return ("no_tool_call",) if self.use.opening else None
        as_json = self.gate if isinstance(self.gate, JsonQuality) else JsonQuality(self.gate)
        return as_json.repetition([call.arguments for call in calls])


def call_ids(messages: Sequence[Message]) -> Callable[[int], str]:
    """Ids for the calls of an answer to ``messages``: nine letters and digits, which all templates take.

    The same conversation gives the same ids, so that a repeated request has an equal answer; a longer one gives others.
    """
    seed = repr(tuple(messages)).encode()

    def name(index: int) -> str:
        return hashlib.blake2b(seed, digest_size=8, person=f"call{index}".encode()[:16]).hexdigest()[:9]

    return name
