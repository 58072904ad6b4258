"""Prompts from JSONL files."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from tta_middleware.errors import ConfigurationError, DataError
from tta_middleware.files.jsonl import Record, id_field, lines, parse_object, text_field
from tta_middleware.types import Message, Role, as_asked

ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One conversation to answer.

    Attributes:
        id: unique in its file; the line number where the file gives none.
        category: the kind of prompt, for the report; empty where the file gives none.
        benign: true where a refusal is an over-refusal, false where it is not, None where the file does not say.
    """

    id: str | int
    messages: tuple[Message, ...]
    category: str = ""
    benign: bool | None = None


def read_prompts(path: Path, limit: int | None = None) -> list[Prompt]:
    """The file's prompts, at most the first ``limit``.

    A line holds ``prompt`` (text) or ``messages`` (a list of objects with ``role`` and ``content``), and may hold
    ``id``, ``category`` (text) and ``benign`` (true or false). Blank lines are skipped; further fields, and these two
    with another kind of value, are ignored.

    Raises:
        DataError: a line cannot be used; the message names file and line.
        ConfigurationError: the file cannot be read or holds no prompt.
    """
    prompts: list[Prompt] = []
    seen: dict[str, int] = {}
    for number, raw in itertools.islice(lines(path), limit):
        where = f"{path}:{number}"
        prompt = parse_prompt(parse_object(raw, where), number, where)
        note_id(seen, prompt.id, number, where)
        prompts.append(prompt)
    if not prompts:
        raise ConfigurationError(f"{path} holds no prompt; one JSON object a line with 'prompt' is needed")
    return prompts


def read_sets(paths: Sequence[Path], limit: int | None = None) -> list[Prompt]:
    """The prompts of several files, at most the first ``limit`` of each.

    Raises:
        DataError: as :func:`read_prompts`, or two files use the same id.
        ConfigurationError: as :func:`read_prompts`.
    """
    prompts: list[Prompt] = []
    files: dict[str, Path] = {}
    for path in paths:
        for prompt in read_prompts(path, limit):
            if str(prompt.id) in files:
                raise DataError(f"{path}: the id {prompt.id!r} was used before, in {files[str(prompt.id)]}")
            prompts.append(prompt)
        files |= dict.fromkeys((str(prompt.id) for prompt in prompts), path)
    return prompts


def note_id(seen: dict[str, int], id_: str | int, number: int, where: str) -> None:
    """Remember the line of an id.

    Raises:
        DataError: an earlier line has the same id.
    """
    first = seen.setdefault(str(id_), number)
    if first != number:
        raise DataError(f"{where}: the id {id_!r} was used before, in line {first}")


def parse_prompt(record: Record, number: int, where: str) -> Prompt:
    """One line's conversation.

    Raises:
        DataError: neither ``prompt`` nor ``messages`` can be used.
    """
    id_ = id_field(record, number, where)
    if "prompt" in record and "messages" in record:
        raise DataError(f"{where}: give 'prompt' or 'messages', not both")
    if "prompt" not in record and "messages" not in record:
        raise DataError(f"{where}: the field 'prompt' (or 'messages') is missing")
    if "messages" in record:
        messages = _messages(record["messages"], where)
    else:
        messages = (Message("user", text_field(record, "prompt", where)),)
    category, benign = record.get("category"), record.get("benign")
    return Prompt(
        id_, messages, category if isinstance(category, str) else "", benign if isinstance(benign, bool) else None
    )


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise DataError(f"{where}: 'messages' must be a list of objects with 'role' and 'content'")
    messages = tuple(_message(turn, f"{where}: message {i}", ROLES) for i, turn in enumerate(value, start=1))
    messages = tuple(as_asked(messages))
    if not any(message.role == "user" for message in messages):
        raise DataError(f"{where}: 'messages' holds neither a user turn nor an instruction to answer")
    return messages


def _message(turn: Record, where: str, roles: Collection[str]) -> Message:
    role = turn.get("role")
    if not isinstance(role, str) or role not in roles:
        raise DataError(f"{where}: 'role' must be one of {', '.join(roles)}")
    return Message(role, text_field(_with_text(turn, where), "content", where))  # type: ignore[arg-type]


def _with_text(turn: Record, where: str) -> Record:
    """The turn with its text for a content that is parts of text, as in requests to OpenAI's API."""
    parts = turn.get("content")
    if not isinstance(parts, list):
        return turn
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            raise DataError(f"{where}: the model reads text only, not {str(kind)[:40]!r}")
    return {**turn, "content": "".join(text_field(part, "text", where, empty=True) for part in parts)}
