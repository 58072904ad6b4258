"""What JSON says once it is decoded: the one place that every surface asks before it has a text judged.

Arguments of tools and structured answers travel as JSON, whose escapes (``\\u0066``) hide words from whoever scores
them as they were written. What is carried out is the decoded value, so that is what has to be scored, beside the
written form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tta_middleware.errors import TTAError
from tta_middleware.types import Message, valid_text

LEVELS = 8
"""Encodings within encodings that are read one by one; what lies deeper is read at its innermost."""

_ESCAPE = re.compile(r'\\(?:u([0-9a-fA-F]{4})|(["\\/bfnrt]))')
_MEANT = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_NESTED = re.compile(r"\\(?:\\|u005[cC])+")
# The beginning of an escape, where a text is cut in the middle of one.
_CUT_ESCAPE = re.compile(r"\\+(?:u[0-9a-fA-F]{0,4})?\Z")
_BEGINNING = re.compile(r"\s*(?:```(?:json)?\s*)?(?:\{\s*\"|\[\s*[\[{\"])")
_NUMBERED_ESCAPE = re.compile(r"\\u[0-9a-fA-F]{4}")
# Letters without any digit may be a word.
_ID = re.compile(
    r"(?:(?:call|chatcmpl|fc|functions|tool|toolu|tooluse)[-_.])*(?=[A-Za-z-]*\d)"
    r"(?:[0-9A-Za-z]{1,64}|[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12})|"
)


def call_text(name: str | None, arguments: Any) -> str:
    """A call as whoever carries it out reads it: its name, then keys and values in order, one to a line.

    ``arguments`` is a mapping, any other plain value, or JSON text. A string that holds escapes, as where arguments
    were encoded twice, is read as it is and decoded, to any depth.
    """
    return "\n".join([*([whole(name)] if name else []), *decoded_lines(arguments)])


def id_text(given: str, name: str) -> str:
    """What a call's id says to a reader: nothing, unless it is more than a number, random letters, or the call's name.

    Some servers take the id from what the model wrote (vLLM for Kimi K2), and a model may write anything.
    """
    return "" if _ID.fullmatch(given) or given.removeprefix("functions.").rstrip("0123456789") == f"{name}:" else given


def says_more(arguments: str) -> bool:
    """Whether JSON text holds more than the value that it is parsed to: what comes twice, or cannot be parsed."""
    try:
        json.loads(arguments, strict=False, object_pairs_hook=_once_each)
    except (ValueError, RecursionError):
        return bool(arguments)
    return False


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice")
    return found


def message_texts(message: Message) -> list[str]:
    """All that a message says: its text and thoughts, and each call that it asks for; what says nothing is left out."""
    said = [message.content, message.reasoning, *(call_text(call.name, call.arguments) for call in message.tool_calls)]
    return [text for text in said if text]


def error_texts(error: BaseException) -> list[str]:
    """All that an error says, and those that it came from or holds: whoever failed may quote what was said to it."""
    pending, found = [error], dict[int, str]()
    while pending:
        one = pending.pop()
        if id(one) in found:
            continue
        found[id(one)] = "\n".join(dict.fromkeys(_told_by(one)))
        pending += [behind for behind in (one.__cause__, one.__context__) if behind is not None]
        pending += one.exceptions if isinstance(one, BaseExceptionGroup) else ()
    return [text for text in found.values() if text.strip()]


def _told_by(error: BaseException) -> Iterator[str]:
    """An error's message, as it is printed in either way, and what else it carries: a model's raw answer, say."""
    yield (message := str(error))
    if isinstance(error, TTAError):
        return  # none carries an answer, and a trace has names of categories in it
    if message not in (printed := repr(error)):
        yield printed
    yield from (*map(str, error.args), *getattr(error, "__notes__", ()))
    for value in getattr(error, "__dict__", {}).values():
        plain = value.model_dump() if hasattr(value, "model_dump") else value
        if isinstance(plain, str | Sequence | Mapping):
            yield str(plain)


def decoded_lines(value: Any) -> Iterator[str]:
    """Every key and every scalar of a plain value in any nesting, in order; a key stands before what it names."""
    for lead, item in _entries(value):
        line = f"{lead}: {item}" if lead and item else lead or item
        yield from (line, *decodings(line))


def decoded_parts(value: Any) -> Iterator[str]:
    """What :func:`decoded_lines` joins: every key, and every scalar, by itself."""
    for lead, item in _entries(value):
        yield from (part for part in (lead, item) if part)


def _entries(value: Any) -> Iterator[tuple[str, str]]:
    """Each scalar as text, after the key that names it; a key that names more than a scalar stands alone."""
    pending: list[tuple[str, Any]] = [("", value)]
    while pending:
        lead, item = pending.pop()
        inner: list[tuple[str, Any]] | None = None
        if isinstance(item, Mapping):
            inner = [(whole(str(key)), child) for key, child in item.items()]
        elif isinstance(item, Sequence) and not isinstance(item, str | bytes):
            inner = [("", child) for child in item]
        if inner is None:
            yield lead, _scalar(item)
            continue
        if lead:
            yield lead, ""
        pending += reversed(inner)  # the last one is taken first


def _scalar(item: Any) -> str:
    """A value as JSON writes it, strings without their quotes."""
    if isinstance(item, str):
        return whole(item)
    return json.dumps(item) if item is None or isinstance(item, bool | int | float) else str(item)


def decodings(text: str) -> list[str]:
    """What reading ``text`` as JSON once, twice and so on makes of it, as long as that changes anything."""
    found: list[str] = []
    while "\\" in text and len(found) < LEVELS:
        text, before = decoded_once(text), text
        if text == before:
            return found
        found.append(text)
    innermost = decoded_once(_NESTED.sub(r"\\", text))
    return [*found, innermost] if innermost != text else found


def decoded_once(text: str) -> str:
    """``text`` with every JSON escape replaced by its character, whether or not the text around it is JSON."""
    return whole(_ESCAPE.sub(_character, text))


def _character(escape: re.Match[str]) -> str:
    number, letter = escape.groups()
    return chr(int(number, 16)) if number else _MEANT.get(letter, letter)


def whole(text: str) -> str:
    """``text`` with pairs of surrogates joined and lone ones replaced, which no encoding could carry."""
    return valid_text(text)


def escapes_from(text: str, begin: int) -> str:
    """``text`` from ``begin`` on, or from where an escape began that ``begin`` would cut."""
    cut = _CUT_ESCAPE.search(text, max(0, begin - 2 * LEVELS), begin)
    return text[cut.start() if cut else begin :]


def begins_as_json(text: str) -> bool:
    """Whether a text begins as an object or a list of JSON does, fenced or not; ``[1]`` in prose is none."""
    return _BEGINNING.match(text) is not None


def json_reading(text: str, begin: int = 0) -> str | None:
    """What a parser of JSON makes of an answer from ``begin`` on; None where ``text`` says so as it is.

    Read so is what is JSON (it begins like JSON, or holds a fenced block, as LangChain's parsers look for them) or has
    escapes that prose has no use for. A backslash in prose alone, as in formulas, is a backslash.
    """
    tail = escapes_from(text, begin)
    if "\\" not in tail:
        return None
    if text.lstrip().startswith(("{", "[", '"')) or "```" in text or _NUMBERED_ESCAPE.search(tail):
        return "\n".join(decodings(tail)) or None
    return None
