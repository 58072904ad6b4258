"""The body of ``POST /v1/responses``: read strictly, and put into the terms of a chat completion.

Served are text and function tools. What would need a store (``previous_response_id``, ``conversation``, ``prompt``),
another process (``background``) or another tool is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from tta_middleware.server.chat_request import (
    IGNORED,
    Body,
    ChatRequest,
    InlineModeration,
    ListOf,
    Stricter,
    read_request,
    text_of_parts,
    without_what_changes_nothing,
)

_NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "background": (False,),
    "include": ([],),
    "max_tool_calls": (),
    "reasoning": ({},),
    "stream_options": ({}, {"include_obfuscation": False}, {"include_obfuscation": True}),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
"""Fields that are taken with these values only, or with null."""

_STORED: Final = dict.fromkeys(
    ("previous_response_id", "conversation", "prompt", "context_management"),
    "nothing is stored, so send the whole conversation as input",
)
"""Fields that name what a server has kept, and what to do instead."""

_TEXT_PARTS: Final = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
Text: TypeAlias = Annotated[str, text_of_parts(_TEXT_PARTS)]


class Item(BaseModel):
    """An item of the input as it came back from some server: fields that no model reads again are let by."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class MessageItem(Item):
    """Somebody's words."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Text


class CallItem(Item):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class OutputItem(Item):
    """What the tool gave back."""

    type: Literal["function_call_output"]
    call_id: str
    output: Text


class ReasoningItem(Item):
    """What some model thought; no model reads it again."""

    type: Literal["reasoning"]


def _with_kind(item: Any) -> Any:
    """Messages may leave out what they are."""
    if not isinstance(item, Mapping):
        return item
    kind = item.get("type", "message")
    if kind == "item_reference":
        raise ValueError(
            "nothing is stored here, so send the item and no reference to it; many clients do with store=false"
        )
    if isinstance(kind, str) and kind not in _ITEMS:
        raise ValueError(f"items of the type {kind[:40]!r} are not served here")
    return {"type": "message", **item}


_ITEMS = ("message", "function_call", "function_call_output", "reasoning")

InputItem: TypeAlias = Annotated[
    Annotated[MessageItem | CallItem | OutputItem | ReasoningItem, Field(discriminator="type")],
    BeforeValidator(_with_kind),
]


def _only_functions(tool: Any) -> Any:
    kind = tool.get("type") if isinstance(tool, Mapping) else None
    if isinstance(kind, str) and kind != "function":
        raise ValueError(f"tools of the type {kind[:40]!r} are not served here, functions are")
    return tool


def _as_items(given: Any) -> Any:
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


class FunctionTool(Body):
    """A function that the model may call."""

    type: Literal["function"]
    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def nested(self) -> dict[str, Any]:
        """As chat completions have it."""
        function = self.model_dump(exclude={"type"}, exclude_none=True)
        return {"type": "function", "function": function}


class TextSettings(Body):
    """How the answer's text is to look."""

    format: dict[str, Any] | None = None
    verbosity: Literal["medium"] | None = None

    def response_format(self) -> dict[str, Any] | None:
        """As chat completions have it."""
        if self.format is None or self.format.get("type") == "text":
            return None
        if self.format.get("type") != "json_schema":
            return self.format
        return {
            "type": "json_schema",
            "json_schema": {name: value for name, value in self.format.items() if name != "type"},
        }


class ResponseRequest(Body):
    """See OpenAI's reference; docs/server.md lists what differs."""

    model: str
    input: Annotated[ListOf[InputItem], Field(min_length=1), BeforeValidator(_as_items)]
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    tools: ListOf[Annotated[FunctionTool, BeforeValidator(_only_functions)]] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    metadata: dict[str, str] | None = None
    moderation: InlineModeration | None = None
    tta: Stricter | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_what_changes_nothing(cls, given: Any) -> Any:
        told = set(IGNORED) - {"metadata"}  # which the response says over again
        return without_what_changes_nothing(given, _NEUTRAL | dict.fromkeys(_STORED, ()), ignored=told, instead=_STORED)

    def chat(self) -> ChatRequest:
        """The same request as a chat completion.

        Raises:
            ApiError: a value is none that a chat completion may have.
        """
        known = {
            "model": self.model,
            "messages": self._messages(),
            "stream": self.stream,
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "tools": [tool.nested() for tool in self.tools] if self.tools else None,
            "tool_choice": self._tool_choice(),
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": self.text.response_format() if self.text else None,
            "moderation": self.moderation.model_dump(exclude_none=True) if self.moderation else None,
            "tta": self.tta.model_dump(exclude_none=True) if self.tta else None,
        }
        return read_request(ChatRequest, {name: value for name, value in known.items() if value is not None})

    def _tool_choice(self) -> str | dict[str, Any] | None:
        if isinstance(self.tool_choice, dict) and "name" in self.tool_choice:
            return {"type": "function", "function": {"name": self.tool_choice["name"]}}
        return self.tool_choice

    def _messages(self) -> list[dict[str, Any]]:
        turns: list[dict[str, Any]] = []
        if self.instructions:
            turns.append({"role": "system", "content": self.instructions})
        for item in self.input:
            match item:
                case MessageItem():
                    turns.append({"role": item.role, "content": item.content})
                case CallItem():
                    if not turns or turns[-1]["role"] != "assistant":
                        turns.append({"role": "assistant", "content": None})
                    function = {"name": item.name, "arguments": item.arguments}
                    calls = turns[-1].setdefault("tool_calls", [])
                    calls.append({"id": item.call_id, "type": "function", "function": function})
                case OutputItem():
                    turns.append({"role": "tool", "content": item.output, "tool_call_id": item.call_id})
        return turns
