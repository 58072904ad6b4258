"""What of a message is text: taken out to be checked, and put back as it was."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeAlias

from langchain_core.messages import (
    LC_ID_PREFIX,
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    HumanMessage,
    SystemMessage,
    ToolCallChunk,
    ToolMessage,
)
from pydantic import BaseModel

from tta_middleware.call_text import call_text, decoded_lines, id_text, says_more

Block: TypeAlias = Mapping[str, Any]

_TEXT_KEYS = {"text": "text", "reasoning": "reasoning", "thinking": "thinking"}
"""Types of content blocks that are streaming text, and the key that holds it."""

_REASONING = "reasoning_content"

_OPAQUE = frozenset({"base64", "data", "encrypted_content", "id", "index", "signature", "thoughtSignature", "type"})
"""Keys of content blocks whose values are no text for a reader, as long as they look like none."""

_ARGUMENTS = frozenset({"args", "arguments", "input", "output", "partial_json"})
"""Keys of content blocks that hold what a tool is given or gives back: there, no key is opaque."""

_CALLS = frozenset({"tool_calls", "function_call"})
"""Additional arguments that hold tool calls as the provider wrote them."""

_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of streaming text.

    Attributes:
        block: the content block it comes from; None for plain string content.
        key: the block's key that holds the text, or ``reasoning_content`` of the additional arguments.
    """

    text: str
    key: str = "text"
    block: Block | None = None

    @property
    def spoken(self) -> bool:
        """Whether it is part of the answer, not of the reasoning."""
        return self.key == "text"

    @property
    def remarks(self) -> str:
        """Other readable text of the block, such as the titles of what it cites."""
        return _readable_text(self.block or {})

    @property
    def place(self) -> Any:
        """What tells the block that the text goes on; None where it stands behind all that came before."""
        return self.block.get("index") if self.block else None if self.spoken else self.key

    @property
    def beside(self) -> AIMessageChunk | None:
        """The block without its text, where that says something, too."""
        return AIMessageChunk(content=[dict(self.block)]) if self.block and self.remarks else None

    def split(self, count: int) -> tuple[Text, Text]:
        """The first ``count`` characters and the others; whatever else the block holds goes with the first."""
        core = None if self.block is None else {key: self.block[key] for key in ("type", "index") if key in self.block}
        return Text(self.text[:count], self.key, self.block), Text(self.text[count:], self.key, core)

    def chunk(self) -> AIMessageChunk:
        """The text in the shape in which it came."""
        if self.key == _REASONING:
            return AIMessageChunk(content="", additional_kwargs={_REASONING: self.text})
        if self.block is None:
            return AIMessageChunk(content=self.text)
        return AIMessageChunk(content=[{**self.block, self.key: self.text}])


@dataclass(frozen=True, slots=True)
class Taken:
    """A message taken apart.

    Attributes:
        texts: its text and reasoning, in order.
        held: its other content blocks and its tool calls; None if there are none.
        tail: what describes the message: usage, metadata, additional arguments.
    """

    texts: list[Text]
    held: AIMessageChunk | None
    tail: AIMessageChunk


def take_apart(message: AIMessage) -> Taken:
    """A message, or a chunk of one, taken apart; together the parts hold all of it."""
    chunk = as_chunk(message)
    texts, others = _sorted(chunk.content)
    if reasoning := chunk.additional_kwargs.get(_REASONING):
        texts.insert(0, Text(str(reasoning), _REASONING))
    held = None
    if others or chunk.tool_call_chunks:
        held = AIMessageChunk(content=others or "", tool_call_chunks=chunk.tool_call_chunks)
    return Taken(texts, held, _tail(chunk))


def as_chunk(message: AIMessage) -> AIMessageChunk:
    """A model that does not stream gives one whole message; the same as a chunk."""
    if isinstance(message, AIMessageChunk):
        return message
    calls = [(call["name"], json.dumps(call["args"], default=str), call["id"]) for call in message.tool_calls]
    calls += [(call["name"] or "", call["args"] or "", call["id"]) for call in message.invalid_tool_calls]
    chunks = [
        ToolCallChunk(name=name, args=args, id=id_, index=index, type="tool_call_chunk")
        for index, (name, args, id_) in enumerate(calls)
    ]
    kept = {"additional_kwargs", "response_metadata", "usage_metadata", "name", "id", "content"}
    return AIMessageChunk(**message.model_dump(include=kept), tool_call_chunks=chunks)


def _sorted(content: str | Sequence[Any]) -> tuple[list[Text], list[Any]]:
    """The blocks of a message's content that are streaming text, and the others."""
    texts, others = list[Text](), list[Any]()
    for block in [content] if isinstance(content, str) else content:
        found = _text_of(block)
        if found is None:
            others.append(block)
        elif found.text or found.block is not None:
            texts.append(found)
    return texts, others


def _text_of(block: Any) -> Text | None:
    if isinstance(block, str):
        return Text(block)
    # A piece of a block may leave out its type, which the first one told.
    key = _TEXT_KEYS.get(block["type"]) if "type" in block else next((key for key in _TEXT_KEYS if key in block), None)
    if key is None or not isinstance(block.get(key), str):
        return None
    return Text(block[key], key, {name: value for name, value in block.items() if name != key})


def _tail(chunk: AIMessageChunk) -> AIMessageChunk:
    kept = {name: value for name, value in chunk.additional_kwargs.items() if name != _REASONING}
    return AIMessageChunk(
        content="",
        additional_kwargs=kept,
        response_metadata=without_probabilities(chunk.response_metadata),
        usage_metadata=chunk.usage_metadata,
        name=chunk.name,
    )


def without_probabilities(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """``response_metadata`` without the tokens that might have stood there, which no moderator has seen."""
    return {name: value for name, value in metadata.items() if "logprob" not in name.lower()}


@dataclass(slots=True)
class Material:
    """The texts of a message that have to be checked, by the part of it that they come from."""

    parts: dict[str, list[str]] = field(default_factory=dict)

    def add(self, part: str, text: str) -> None:
        if text.strip():
            self.parts.setdefault(part, []).append(text)

    def __iter__(self) -> Iterator[tuple[str, list[str]]]:
        return iter(self.parts.items())

    @property
    def texts(self) -> list[str]:
        return [text for texts in self.parts.values() for text in texts]


def material(message: BaseMessage) -> Material:
    """All that a reader, a tool or a later model call could get to see of a message, its artifact excepted."""
    found = Material()
    if isinstance(message, AIMessage):
        taken = take_apart(message)
        texts = taken.texts
        others = [*(held_material(taken.held) if taken.held is not None else ()), *tail_material(taken.tail)]
        # A chunk has none of the errors that whoever could not read a call has written down.
        others += [("tool_call", call.get("error") or "") for call in message.invalid_tool_calls]
    else:
        texts, blocks = _sorted(message.content)
        others = [("block", _readable_text(blocks)), ("additional_kwargs", _readable_text(message.additional_kwargs))]
    found.add("text", "".join(text.text for text in texts if text.spoken))
    found.add("reasoning", "".join(text.text for text in texts if not text.spoken))
    others = [*(("block", text.remarks) for text in texts), *others]
    others.append(("attributes", _readable_text(message.model_extra)))
    for part, other in others:
        found.add(part, other)
    return found


def held_material(held: AIMessageChunk) -> Iterator[tuple[str, str]]:
    """The texts of tool calls, decoded, and of content blocks that are no text."""
    for made in (*held.tool_calls, *held.invalid_tool_calls):
        yield "tool_call", id_text(made["id"] or "", made["name"] or "")
    for call in held.tool_calls:
        yield "tool_call", call_text(call["name"], call["args"])
    for broken in held.invalid_tool_calls:
        yield "tool_call", _as_written(broken["name"], broken["args"] or "")
    for chunk in held.tool_call_chunks:
        if says_more(chunk["args"] or ""):
            yield "tool_call", _as_written(chunk["name"], chunk["args"] or "")
    for block in held.content if isinstance(held.content, list) else ():
        yield "block", _readable_text(block)


def tail_material(tail: AIMessageChunk) -> Iterator[tuple[str, str]]:
    """The texts of additional arguments; reasoning stands among a message's texts."""
    kwargs = tail.additional_kwargs
    for call in [*_listed(kwargs.get("tool_calls")), *_listed(kwargs.get("function_call"))]:
        yield "tool_call", _raw_call_text(call)
    others = {name: value for name, value in kwargs.items() if name not in _CALLS and name != _REASONING}
    yield "additional_kwargs", _readable_text(others)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def _raw_call_text(call: Any) -> str:
    """A call in a provider's own form, in which the arguments are JSON text."""
    function = call.get("function", call) if isinstance(call, Mapping) else call
    if not isinstance(function, Mapping) or not isinstance(arguments := function.get("arguments"), str):
        return "\n".join(decoded_lines(call))
    name = function.get("name")
    return (
        _as_written(name, arguments)
        if says_more(arguments)
        else call_text(name, json.loads(arguments or "{}", strict=False))
    )


def _as_written(name: str | None, arguments: str) -> str:
    """A call that cannot be parsed as it was meant: as it was written, and with its escapes resolved.

    Whoever mends broken JSON does so in a way of his own; the words in it stay the same.
    """
    resolved = _ESCAPE.sub(_resolved, arguments)
    return call_text(name, arguments if resolved == arguments else [arguments, resolved])


def _resolved(escape: re.Match[str]) -> str:
    sign = escape[1]
    return chr(int(sign[1:], 16)) if len(sign) > 1 else {"n": "\n", "r": "\r", "t": "\t"}.get(sign, sign)


def plain_text(value: Any) -> str:
    """All that any value says, decoded, one piece to a line: objects by their fields, messages by their texts."""
    return "\n".join(decoded_lines(_plain_value(value)))


def _plain_value(value: Any) -> Any:
    match value:
        case BaseMessage():
            return [*material(value).texts, _plain_value(getattr(value, "artifact", None) or [])]
        case BaseModel():
            return {
                name: _plain_value(getattr(value, name))
                for name in [*type(value).model_fields, *(value.model_extra or ())]
            }
        case Mapping():
            return {str(key): _plain_value(item) for key, item in value.items()}
        case list() | tuple() | set() | frozenset() | deque():
            return [_plain_value(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {one.name: _plain_value(getattr(value, one.name)) for one in fields(value)}
    return value


def _readable_text(value: Any) -> str:
    """Readable text in any nesting, decoded, one piece to a line; empty if there is none."""
    return "\n".join(decoded_lines(_readable(value))) if value else ""


def _readable(value: Any) -> Any:
    """A plain value without what is no text for a reader."""
    if isinstance(value, BaseModel):
        return _readable(value.model_dump())
    if isinstance(value, Mapping):
        kept = {
            name: item if name in _ARGUMENTS else _readable(item)
            for name, item in value.items()
            if name not in _OPAQUE or _is_prose(item)
        }
        return {name: item for name, item in kept.items() if item}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [item for item in map(_readable, value) if item]
    return value if isinstance(value, str) and not _is_data_url(value) else None


def _is_prose(value: Any) -> bool:
    """Whether a value may be words: base64, signatures and ids have neither white space nor letters beyond ASCII."""
    if isinstance(value, str):
        return not value.isascii() or len(value.split(maxsplit=1)) > 1
    return isinstance(value, Mapping | list)


def _is_data_url(value: str) -> bool:
    return value.startswith("data:") and ";base64," in value[:200] and not _is_prose(value)


def text_only(messages: Sequence[BaseMessage]) -> list[BaseMessage]:
    """The conversation as a local text model can read it."""
    return [_plain(message) for message in messages if message.text.strip()]


def _plain(message: BaseMessage) -> BaseMessage:
    match message:
        case SystemMessage():
            return SystemMessage(message.text)
        case ToolMessage():
            return ToolMessage(message.text, tool_call_id=message.tool_call_id, name=message.name)
        case AIMessage():
            return AIMessage(message.text)
    return HumanMessage(message.text)


def last_human_text(messages: Sequence[BaseMessage]) -> str | None:
    """What the answer answers, for moderators that read it."""
    return next((message.text for message in reversed(messages) if isinstance(message, HumanMessage)), None)


def own_id(given: str | None) -> str | None:
    """The provider's id of a message; LangChain's own is that of the inner run, so the guard's takes its place."""
    return None if given is None or given.startswith(LC_ID_PREFIX) else given
