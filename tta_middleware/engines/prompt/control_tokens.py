"""Text that spells a control token (``<|im_end|>``) stays text, so that nobody can forge a turn from inside one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

from tta_middleware.engines.prompt.thoughts import ThoughtMarks, find_marks, is_thought_mark
from tta_middleware.errors import ConfigurationError
from tta_middleware.tool_forms import TOOL_MARKS

Span: TypeAlias = tuple[int, int]
Token: TypeAlias = tuple[int, Span]
"""Token id, and which characters of the text it stands for."""

_PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE))


class ControlTokens:
    """The tokens that structure a tokenizer's conversations.

    Besides the special tokens these are marks of thoughts, and added ones that stand in the chat template (Qwen's
    ``<tool_call>`` is not special). Other added tokens are words like any other: Gemma has HTML tags and runs of spaces
    among them.
    """

    def __init__(self, tokenizer: Any, template: str) -> None:
        added = {token_id: (str(token), bool(token.special)) for token_id, token in _added(tokenizer)}
        special = [text for text, is_special in added.values() if is_special]
        self.special = _any_of(text for text in special if text not in TOOL_MARKS)
        marks = [text for text, _ in added.values() if text in template or is_thought_mark(text)]
        self.all = _any_of([*special, *(text for text in marks if text.strip())])
        self.ids = frozenset(added)

    def encode(self, tokenizer: Any, text: str, spelled: Sequence[Span]) -> list[Token]:
        """Tokens of ``text``; a control token that lies in a ``spelled`` stretch is tokenised as plain text."""
        tokens: list[Token] = []
        for token_id, span in _encode(tokenizer, text):
            forged = token_id in self.ids and any(span[0] < end and start < span[1] for start, end in spelled)
            tokens += self._plain(tokenizer, text, span) if forged else [(token_id, span)]
        return tokens

    def _plain(self, tokenizer: Any, text: str, span: Span) -> list[Token]:
        start, end = span
        found = _encode(tokenizer, text[start:end], split_special_tokens=True)
        if end - start > 1 and self.ids & {token_id for token_id, _ in found}:
            # Added tokens that are not special are found in any text, but not in two halves of it.
            halves = ((start, start + 1), (start + 1, end))
            return [token for half in halves for token in self._plain(tokenizer, text, half)]
        return [(token_id, (start + first, start + last)) for token_id, (first, last) in found]


class Veil:
    """Hides what content spells while the chat template is rendered, so that its own control tokens stand out.

    Args:
        control: what to hide.
        content: everything that will be rendered; the marks are made of a character that is not in it.
    """

    def __init__(self, control: ControlTokens, content: str) -> None:
        self._control = control
        self._mark = _unused(content)
        self._hidden: list[str] = []
        self.placeholder = f"{self._mark}user{self._mark}"

    def hide(self, value: Any, *, special_only: bool = False) -> Any:
        """The same JSON-like value; its strings are marked where they spell a control token."""
        if isinstance(value, dict):
            return {
                self.hide(key, special_only=special_only): self.hide(value[key], special_only=special_only)
                for key in value
            }
        if isinstance(value, list | tuple):
            return [self.hide(item, special_only=special_only) for item in value]
        if isinstance(value, str):
            return (self._control.special if special_only else self._control.all).sub(self._hide, value)
        return value

    def lift(self, text: str) -> tuple[str, list[Span]]:
        """The rendered text as it was meant, and where content spells a control token."""
        parts, spelled, length = [], [], 0
        for index, part in enumerate(re.split(f"{self._mark}([0-9]+){self._mark}", text)):
            hidden = self._hidden[int(part)] if index % 2 else part
            if index % 2:
                spelled.append((length, length + len(hidden)))
            parts.append(hidden)
            length += len(hidden)
        return "".join(parts), spelled

    def _hide(self, found: re.Match[str]) -> str:
        self._hidden.append(found[0])
        return f"{self._mark}{len(self._hidden) - 1}{self._mark}"


def silent_ids(tokenizer: Any) -> frozenset[int]:
    """Ids that give no text in an answer: special tokens, but for those that mark a tool call."""
    special = {token_id for token_id, token in _added(tokenizer) if token.special}
    marks = {token_id for token_id, token in _added(tokenizer) if str(token) in TOOL_MARKS}
    return frozenset(special.union(tokenizer.all_special_ids) - marks)


def thought_marks(tokenizer: Any) -> ThoughtMarks | None:
    """How the tokenizer's model marks its thoughts; None if it is not known to have any."""
    template = tokenizer.chat_template or ""
    text = "".join(template.values()) if isinstance(template, dict) else str(template)
    tokens = {str(token) for _, token in _added(tokenizer)}
    return find_marks(tokens, text, getattr(tokenizer, "response_template", None))


def mark_ids(tokenizer: Any, marks: ThoughtMarks | None) -> dict[int, str]:
    """The marks that are tokens, by id."""
    tokens = frozenset() if marks is None else marks.tokens
    return {token_id: str(token) for token_id, token in _added(tokenizer) if str(token) in tokens}


def spelled_in(pattern: re.Pattern[str], text: str) -> list[Span]:
    """Where ``text`` spells one of the pattern's tokens."""
    return [found.span() for found in pattern.finditer(text)]


def _added(tokenizer: Any) -> Iterator[tuple[int, Any]]:
    yield from tokenizer.added_tokens_decoder.items()


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    # The longest first, as tokenizers match; without any, a pattern that matches nothing.
    return re.compile("|".join(re.escape(text) for text in sorted(set(texts), key=len, reverse=True)) or r"(?!)")


def _encode(tokenizer: Any, text: str, **options: Any) -> list[Token]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, **options)
    return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))


def _unused(content: str) -> str:
    used = set(content)
    for code in (code for block in _PRIVATE_USE for code in block):
        if chr(code) not in used:
            return chr(code)
    raise ConfigurationError("the conversation uses every private-use character there is; shorten it")
