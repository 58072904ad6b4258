"""How long texts and conversations are for a model's own tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tta_middleware.call_text import whole
from tta_middleware.engines.prompt.control_tokens import ControlTokens, spelled_in
from tta_middleware.engines.prompt.template import chat_template, render_prompt
from tta_middleware.errors import ConfigurationError, EmptyPromptError
from tta_middleware.types import Message

_ASKED = "."
"""Stands in for the user's words where a part of a conversation holds none: one token in every vocabulary."""


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text by itself; what spells a control token is text, as in a prompt.

    Raises:
        ConfigurationError: the tokenizer has no chat template, or is not a fast one.
    """
    text = whole(text)
    control = ControlTokens(tokenizer, chat_template(tokenizer))
    return [token_id for token_id, _ in control.encode(tokenizer, text, spelled_in(control.all, text))]


def count_prompt(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> int:
    """Tokens of a conversation, or a part of one, with its template.

    A part without user text is counted before a turn of the user, less that turn's words. A part that the template
    refuses by itself, as one that begins with an answer, is counted turn by turn: never too few.

    Raises:
        ConfigurationError: no chat template, or one that takes no tools.
    """
    chat_template(tokenizer, tools=bool(tools))
    if not messages:
        return 0
    try:
        return _rendered(tokenizer, messages, tools)
    except ConfigurationError:
        if len(messages) == 1 and messages[0].role == "user":
            raise
    return sum(_alone(tokenizer, message, tools if index == 0 else ()) for index, message in enumerate(messages))


def _rendered(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> int:
    try:
        return len(render_prompt(tokenizer, messages, tools=tools).token_ids)
    except EmptyPromptError:
        asked = [*messages, Message("user", _ASKED)]
        return len(render_prompt(tokenizer, asked, tools=tools).token_ids) - 1


def _alone(tokenizer: Any, message: Message, tools: Sequence[Mapping[str, Any]]) -> int:
    """Tokens of a turn as if it were the user's, with a template of its own."""
    said = " ".join([message.content, *(f"{call.name} {dict(call.arguments)}" for call in message.tool_calls)])
    return _rendered(tokenizer, [Message("user", said if said.strip() else _ASKED)], tools)
