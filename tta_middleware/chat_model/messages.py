"""LangChain messages in and out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.messages.ai import OutputTokenDetails, UsageMetadata
from langchain_core.messages.tool import ToolCall as LangChainToolCall

from tta_middleware.errors import ConfigurationError
from tta_middleware.types import GuardedAnswer, Message, Role, ToolCall

_ROLES: dict[type[BaseMessage], Role] = {
    SystemMessage: "system",
    HumanMessage: "user",
    AIMessage: "assistant",
    ToolMessage: "tool",
    FunctionMessage: "tool",
}
_CHAT_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "ai": "assistant",
    "tool": "tool",
    "function": "tool",
}
_NO_TEXT = ("reasoning", "tool_use", "tool_call")

REASONING: Final = "reasoning_content"
"""Key of ``additional_kwargs`` for thoughts, of which LangChain makes reasoning blocks."""

_THOUGHT_KEYS = {"reasoning": "reasoning", "thinking": "thinking"}
"""Types of content blocks that hold thoughts, and the key that does."""


def from_langchain(messages: Sequence[BaseMessage]) -> list[Message]:
    """Plain turns from LangChain's messages; calls that could not be read (``invalid_tool_calls``) are left out.

    Of what a model said, another provider's model included, text is kept, and thoughts, which only chat templates
    that ask for them are shown: its own tools and the like are blocks that no other model reads.

    Raises:
        ConfigurationError: a role, or in another turn than a model's a content block (an image, say), that a text model
            cannot read.
    """
    names = {call["id"]: call["name"] for message in messages for call in _calls(message)}
    return [_turn(message, names) for message in messages]


def _turn(message: BaseMessage, names: Mapping[str | None, str]) -> Message:
    role = _role(message)
    text = _text(message.content, strict=role != "assistant")
    if role == "tool":
        call_id = getattr(message, "tool_call_id", None)
        # Some templates want the tool's name, which only the call has.
        return Message(role, text, (), message.name or names.get(call_id), call_id)
    calls = tuple(ToolCall(call["name"], call["args"], call["id"] or "") for call in _calls(message))
    return Message(role, text, calls, reasoning=_thought(message) if role == "assistant" else "")


def _thought(message: BaseMessage) -> str:
    """What a turn thought before its answer."""
    blocks = [] if isinstance(message.content, str) else [b for b in message.content if isinstance(b, Mapping)]
    keyed = [(block, _THOUGHT_KEYS.get(str(block.get("type")))) for block in blocks]
    found = [str(block.get(key) or "") for block, key in keyed if key is not None]
    return "".join(found) or str(message.additional_kwargs.get(REASONING) or "")


def _calls(message: BaseMessage) -> list[LangChainToolCall]:
    return message.tool_calls if isinstance(message, AIMessage) else []


def to_langchain(messages: Sequence[Message]) -> list[BaseMessage]:
    """The way back, for runnables that are given a conversation."""
    return [_back(message) for message in messages]


def _back(message: Message) -> BaseMessage:
    match message.role:
        case "system":
            return SystemMessage(message.content)
        case "user":
            return HumanMessage(message.content)
        case "tool":
            return ToolMessage(message.content, tool_call_id=message.tool_call_id or "", name=message.name)
        case "assistant":
            calls = [LangChainToolCall(name=c.name, args=dict(c.arguments), id=c.id) for c in message.tool_calls]
            return AIMessage(message.content, tool_calls=calls)


def _role(message: BaseMessage) -> Role:
    if isinstance(message, ChatMessage) and message.role in _CHAT_ROLES:
        return _CHAT_ROLES[message.role]
    for kind, role in _ROLES.items():
        if isinstance(message, kind):
            return role
    raise ConfigurationError(f"cannot render a {type(message).__name__}; use system, user, assistant or tool messages")


def _text(content: str | list[Any], *, strict: bool) -> str:
    if isinstance(content, str):
        return content
    return "".join(_blocks(content, strict=strict))


def _blocks(content: list[Any], *, strict: bool) -> Iterator[str]:
    """The texts of content blocks; with ``strict``, those that hold something else are an error."""
    for block in content:
        if isinstance(block, str):
            yield block
            continue
        kind = block.get("type", "text") if isinstance(block, Mapping) else type(block).__name__
        if kind in ("text", "output_text"):
            yield block.get("text") or ""
        elif kind == "refusal":
            yield block.get("refusal") or block.get("text") or ""
        elif strict and kind not in _NO_TEXT:
            raise ConfigurationError(f"a text model cannot read content of type {kind!r}; send text blocks")


def metadata(answer: GuardedAnswer) -> dict[str, Any]:
    """What ``response_metadata`` says of an answer."""
    return {
        "model_name": answer.trace.model,
        "model_provider": "tta_middleware",
        "finish_reason": answer.finish_reason,
        "tta": answer.trace.as_dict(),
    }


def usage(answer: GuardedAnswer) -> UsageMetadata:
    """Tokens of the prompt once, and every token that was decoded for the answer, the repair's included.

    Those that were thought are counted among them, and by themselves, whether or not they are shown.
    """
    output, thought = answer.trace.generated_tokens, answer.trace.reasoning
    told = UsageMetadata(
        input_tokens=answer.prompt_tokens, output_tokens=output, total_tokens=answer.prompt_tokens + output
    )
    if thought is not None:
        told["output_token_details"] = OutputTokenDetails(reasoning=thought.tokens)
    return told
