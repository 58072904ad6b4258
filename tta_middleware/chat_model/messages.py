"""LangChain messages in and out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.messages.ai import UsageMetadata

from tta_middleware.errors import ConfigurationError
from tta_middleware.types import GuardedAnswer, Message, Role

_ROLES: dict[type[BaseMessage], Role] = {
    SystemMessage: "system",
    HumanMessage: "user",
    AIMessage: "assistant",
    ToolMessage: "tool",
}
_CHAT_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "ai": "assistant",
    "tool": "tool",
}


def from_langchain(messages: Sequence[BaseMessage]) -> list[Message]:
    """Plain turns from LangChain's messages.

    Raises:
        ConfigurationError: a role or a content block (an image, say) that a text model cannot read.
    """
    return [Message(_role(message), _text(message.content)) for message in messages]


def _role(message: BaseMessage) -> Role:
    if isinstance(message, ChatMessage) and message.role in _CHAT_ROLES:
        return _CHAT_ROLES[message.role]
    for kind, role in _ROLES.items():
        if isinstance(message, kind):
            return role
    raise ConfigurationError(f"cannot render a {type(message).__name__}; use system, user, assistant or tool messages")


def _text(content: str | list[Any]) -> str:
    if isinstance(content, str):
        return content
    return "".join(_blocks(content))


def _blocks(content: list[Any]) -> Iterator[str]:
    for block in content:
        if isinstance(block, str):
            yield block
        elif block.get("type") == "text":
            yield block["text"]
        elif block.get("type") in ("reasoning", "tool_use", "tool_call"):
            continue
        else:
            raise ConfigurationError(
                f"a text model cannot read content of type {block.get('type')!r}; send text blocks"
            )


def to_message(answer: GuardedAnswer) -> AIMessage:
    """The answer as one message."""
    return AIMessage(content=answer.text, response_metadata=_metadata(answer), usage_metadata=_usage(answer))


def last_chunk(answer: GuardedAnswer) -> AIMessageChunk:
    """The end of a stream. The metadata stands on one chunk only, since strings would concatenate on merge."""
    return AIMessageChunk(
        content="", response_metadata=_metadata(answer), usage_metadata=_usage(answer), chunk_position="last"
    )


def _metadata(answer: GuardedAnswer) -> dict[str, Any]:
    return {
        "model_name": answer.trace.model,
        "model_provider": "tta_middleware",
        "finish_reason": answer.finish_reason,
        "tta": answer.trace.as_dict(),
    }


def _usage(answer: GuardedAnswer) -> UsageMetadata:
    """Tokens of the prompt once, and every token that was decoded for the answer, the repair's included."""
    output = answer.trace.generated_tokens
    return UsageMetadata(
        input_tokens=answer.prompt_tokens, output_tokens=output, total_tokens=answer.prompt_tokens + output
    )
