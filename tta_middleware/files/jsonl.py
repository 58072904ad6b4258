"""Files with one JSON object a line: reading with errors that name file and line, and recovery after a kill."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from tta_middleware.errors import ConfigurationError, DataError

Record: TypeAlias = dict[str, Any]

_BOM = b"\xef\xbb\xbf"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


def parse_object(raw: bytes, where: str) -> Record:
    """The object of one line; ``where`` (file and line) begins every message.

    Raises:
        DataError: not UTF-8, not JSON, or JSON but no object.
    """
    try:
        text = raw.removeprefix(_BOM).rstrip(b"\r\n").decode()
    except UnicodeDecodeError as error:
        if raw.startswith(_UTF_16):
            raise DataError(f"{where}: UTF-16, not UTF-8; iconv -f utf-16 -t utf-8 makes it that") from None
        raise DataError(f"{where}: not UTF-8 (byte {raw[error.start]:#04x} at position {error.start + 1})") from None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError):
        raise DataError(f"{where}: not valid JSON (a number too long or brackets too deep)") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: a JSON object is needed, such as {{...}}, not {_kind(value)}")
    return value


def text_field(record: Record, name: str, where: str, *, empty: bool = False) -> str:
    """A field that must hold text; white space alone only where ``empty``.

    Raises:
        DataError: it is missing, no string, empty, or holds half of a surrogate pair.
    """
    if name not in record:
        raise DataError(f"{where}: the field {name!r} is missing")
    value = record[name]
    if not isinstance(value, str):
        raise DataError(f"{where}: {name!r} must be text, not {_kind(value)}")
    if not (empty or value.strip()):
        raise DataError(f"{where}: {name!r} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: {name!r} holds half of a surrogate pair, which is no text") from None
    return value


def id_field(record: Record, default: int, where: str) -> str | int:
    """The record's ``id``; ``default`` without one.

    Raises:
        DataError: the id is neither text nor a whole number.
    """
    value = record.get("id", default)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise DataError(f"{where}: 'id' must be text or a whole number, not {_kind(value)}")
    return text_field(record, "id", where) if isinstance(value, str) else value


def open_input(path: Path) -> BinaryIO:
    """Open a file that a user named.

    Raises:
        ConfigurationError: it is missing, a folder, or not readable.
    """
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise ConfigurationError(f"no such file: {path}") from None
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from None


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, numbered from 1."""
    with open_input(path) as file:
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                yield number, raw


def dump(record: Record) -> str:
    """One line of JSON. Characters beyond ASCII are escaped, so that any terminal and any locale can take it."""
    return json.dumps(record, allow_nan=False)


def recover(path: Path) -> Iterator[Record]:
    """The objects that an earlier run has written; a last line that a kill tore off is cut from the file.

    The file is repaired when the iterator is used up.

    Raises:
        DataError: another line is broken, so the file is not one of ours.
    """
    if not path.exists():
        return
    intact, tail = 0, b""
    with open_input(path) as file:
        for number, raw in enumerate(file, start=1):
            try:
                yield parse_object(raw, f"{path}:{number}")
            except DataError:
                if raw.endswith(b"\n") or not raw.startswith(b"{"):
                    raise
                break
            intact, tail = intact + len(raw), raw[-1:]
    with path.open("r+b") as file:
        file.truncate(intact)
        file.seek(intact)
        file.write(b"\n" if tail not in (b"", b"\n") else b"")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number") if value != "" else "empty text"
