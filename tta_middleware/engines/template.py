"""Conversation to tokens: the chat template, and which tokens are the user's words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tta_middleware.errors import ConfigurationError, EmptyPromptError
from tta_middleware.types import Message

# Stands in for the user's text when the template is rendered to find where that text goes. Letters of a
# private-use area: no template strips or matches them, and no user types them.
_PLACEHOLDER = "\ue0a7tta\ue0a8user\ue0a9"


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """Token ids of a prompt, and for each whether it is content of the last user turn."""

    token_ids: list[int]
    user_mask: list[bool]


def render_prompt(tokenizer: Any, messages: Sequence[Message], assistant_prefix: str = "") -> RenderedPrompt:
    """Tokenise a conversation with the generation prompt appended.

    The rendering is tokenised once and whole. A token belongs to the user only if all its characters do, so
    tokens that straddle template and content stay out of the mask.

    Raises:
        EmptyPromptError: the last user turn is empty or there is none.
        ConfigurationError: the tokenizer has no chat template, refuses the roles, or is not a fast one.
    """
    turn = last_user_turn(messages)
    text = _render(tokenizer, messages)
    start, end = _content_span(tokenizer, messages, turn, text)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = [start <= first < last <= end for first, last in encoded["offset_mapping"]]
    prefix = _plain_ids(tokenizer, assistant_prefix)
    return RenderedPrompt([*encoded["input_ids"], *prefix], [*mask, *(False for _ in prefix)])


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def last_user_turn(messages: Sequence[Message]) -> int:
    """Index of the last user message.

    Raises:
        EmptyPromptError: it is empty, or there is none.
    """
    for index in range(len(messages) - 1, -1, -1):
        if messages[index].role == "user":
            if messages[index].content.strip():
                return index
            raise EmptyPromptError("the last user message is empty; give the model something to answer")
    raise EmptyPromptError("the conversation has no user message; add one")


def _render(tokenizer: Any, messages: Sequence[Message]) -> str:
    import jinja2

    if not getattr(tokenizer, "is_fast", False):
        raise ConfigurationError("the model's tokenizer reports no character offsets; use one with tokenizer.json")
    if not tokenizer.chat_template:
        raise ConfigurationError("the model has no chat template; use an instruction-tuned model")
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError as exc:
        roles = ", ".join(message.role for message in messages)
        raise ConfigurationError(f"the model's chat template refuses the roles {roles}: {exc}") from exc
    return str(text)


def _content_span(tokenizer: Any, messages: Sequence[Message], turn: int, text: str) -> tuple[int, int]:
    """Where the user's words are in ``text``; found by rendering with a placeholder in their place.

    Searching for the words themselves could hit another turn or the template ('user', 'im_end').
    """
    replaced = [*messages]
    replaced[turn] = Message("user", _PLACEHOLDER)
    before, _, after = _render(tokenizer, replaced).partition(_PLACEHOLDER)
    end = len(text) - len(after)
    if text[: len(before)] != before or text[end:] != after or end <= len(before):
        raise ConfigurationError("the model's chat template rewrites the user's text, so it cannot be located")
    return len(before), end
