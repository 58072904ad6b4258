"""What a tool call says once it is decoded: the one text that every surface has judged.

Arguments travel as JSON, whose escapes (``\\u0066``) hide words from whoever scores it as it was written. What is
carried out is the decoded value, so that is what has to be scored, beside the written form.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_JSON_BEGINS = ("{", "[", '"')


def call_text(name: str | None, arguments: Any) -> str:
    """A call as whoever carries it out reads it: its name, then keys and values in order, one to a line.

    ``arguments`` is a mapping, any other plain value, or JSON text. A string that holds JSON itself, as where arguments
    were encoded twice, is read as it is and decoded, to any depth.
    """
    return "\n".join([*([name] if name else []), *decoded_lines(arguments)])


def decoded_lines(value: Any) -> Iterator[str]:
    """Every key and every scalar of a plain value in any nesting, in order; a key stands before what it names."""
    pending: list[tuple[str, Any]] = [("", value)]
    while pending:
        lead, item = pending.pop()
        if isinstance(item, Mapping):
            # A stack gives the last one first.
            pending += [(f"{key}: ", child) for key, child in reversed(list(item.items()))]
            if lead:
                yield lead.rstrip()
        elif isinstance(item, Sequence) and not isinstance(item, str | bytes):
            pending += [("", child) for child in reversed(item)]
            if lead:
                yield lead.rstrip()
        else:
            yield f"{lead}{item}"
            if isinstance(item, str) and (inner := _json_within(item)) is not None:
                pending.append(("", inner))


def _json_within(text: str) -> Any:
    """What a string holds as JSON, if that says anything else than the string itself."""
    if not text.lstrip().startswith(_JSON_BEGINS):
        return None
    try:
        inner = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None
    return None if inner == text else inner
