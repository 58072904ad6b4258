"""Values of a call's arguments, of what a model wrote: JSON, its variants, and tagged text typed by a schema. Pure."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# What models that write Python's words mean, lower case.
_WORDS = {"true": True, "false": False, "null": None, "none": None}
_TYPES: Mapping[str, tuple[type, ...]] = {
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}
_MOST_NESTED = 8
"""Schemas within schemas that are looked through for a value's type."""

_BARE_KEY = re.compile(r"([{,]\s*)([^\s{}\[\],:\"]+)(\s*:)")
_NO_VALUE = re.compile(r"([:,\[]\s*)None(?=\s*[,\]}])")


def read_json(text: str, at: int) -> tuple[Any, int]:
    """The JSON value at a place, white space before it left out, and where it ends.

    Raises:
        ValueError: there is none.
    """
    blank = re.compile(r"\s*").match(text, at)
    value, end = json.JSONDecoder(strict=False).raw_decode(text, blank.end() if blank else at)
    return value, end


def plain_json(text: str, quote: str) -> str:
    """JSON of what stands its strings between ``quote`` and leaves keys bare, as Gemma 4 writes it."""
    parts = text.split(quote)
    return "".join(json.dumps(p) if index % 2 else _plain(p) for index, p in enumerate(parts))


def _plain(text: str) -> str:
    return _NO_VALUE.sub(r"\1null", _BARE_KEY.sub(_quoted, text))


def _quoted(found: re.Match[str]) -> str:
    return f"{found[1]}{json.dumps(found[2])}{found[3]}"


def typed_arguments(values: Mapping[str, str], name: str, tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Tagged values as the tool of that name takes them: a string stays as it was written.

    What the schema does not name, or names no type of, is a string; so is what cannot be read as the type.
    """
    schema = next((_parameters(tool) for tool in tools if _name(tool) == name), {})
    properties = schema.get("properties")
    known = properties if isinstance(properties, Mapping) else {}
    return {key: _typed(value, set(_types(known.get(key), schema))) for key, value in values.items()}


def _name(tool: Mapping[str, Any]) -> Any:
    return tool["function"].get("name")


def _parameters(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    found = tool["function"].get("parameters")
    return found if isinstance(found, Mapping) else {}


def _typed(text: str, types: set[str]) -> Any:
    bare = text.strip()
    word = bare.lower()
    if word in ("null", "none") and "null" in types:
        return None
    try:
        value = _WORDS[word] if word in _WORDS else _read(bare)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text
    if "integer" in types and isinstance(value, float) and value.is_integer() and "number" not in types:
        value = int(value)
    return value if any(_is(value, kind) for kind in types) else text


def _read(text: str) -> Any:
    """Of JSON, or of Python's literal of a list or mapping, as some templates teach it (Seed-OSS)."""
    try:
        return json.loads(text, strict=False)
    except ValueError:
        if not text.startswith(("[", "{")):
            raise
        return ast.literal_eval(text)


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, _TYPES.get(kind, ()))


def _types(schema: Any, root: Mapping[str, Any], depth: int = 0) -> Iterator[str]:
    """The names of the types that a schema takes."""
    if not isinstance(schema, Mapping) or depth > _MOST_NESTED:
        return
    named = schema.get("type")
    yield from [named] if isinstance(named, str) else filter(_is_text, named or ())
    values = [schema["const"]] if "const" in schema else schema.get("enum") or ()
    if named is None:
        yield from (kind for value in values for kind in _TYPES if _is(value, kind))
    for key in ("anyOf", "oneOf", "allOf"):
        for part in schema.get(key) or ():
            yield from _types(part, root, depth + 1)
    yield from _types(_referred(schema.get("$ref"), root), root, depth + 1)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _referred(reference: Any, root: Mapping[str, Any]) -> Any:
    """What a reference into the same schema names; None for any other."""
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    found: Any = root
    for part in reference[2:].split("/"):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found
