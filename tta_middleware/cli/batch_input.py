"""Reads the prompts of a batch, line by line as they arrive: from a file or a pipe, gzip or not."""

from __future__ import annotations

import hashlib
import json
import sys
import zlib
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import anyio

from tta_middleware.cli.batch_options import STDIO, Shard
from tta_middleware.cli.chunking import LONGEST, Lines
from tta_middleware.errors import ConfigurationError, DataError
from tta_middleware.evaluation.datasets import Prompt, parse_prompt
from tta_middleware.evaluation.jsonl import Record, parse_object
from tta_middleware.types import Sampling

GZIP = b"\x1f\x8b"
GZIP_WINDOW = 31
"""zlib's word for a gzip header and trailer around the largest window."""

_READ = 65536


@dataclass(frozen=True, slots=True)
class Item:
    """One input line: a prompt and how to decode it, or why there is none.

    Attributes:
        number: of the line, from 1; blank lines count.
        where: input and line, for messages.
        digest: of messages and sampling overrides, 16 hex digits; empty for a line without prompt.
    """

    number: int
    where: str
    prompt: Prompt | None
    sampling: Sampling
    digest: str = ""
    error: DataError | None = None

    @property
    def key(self) -> tuple[str, str]:
        """What the output line is known by; a broken line has no id, so its number stands in."""
        return ("line", str(self.number)) if self.prompt is None else ("id", str(self.prompt.id))


class Source:
    """Where the prompts come from.

    Args:
        name: a file, or ``-`` for stdin.
        sampling: what a line's own ``sampling`` overrides.

    Attributes:
        lines_seen: lines that were not blank, of all shards, since :meth:`items` began.
    """

    def __init__(self, name: str, sampling: Sampling) -> None:
        self.name = "stdin" if name == STDIO else name
        self._path = None if name == STDIO else Path(name)
        self._sampling = sampling
        self.lines_seen = 0

    @property
    def rereadable(self) -> bool:
        """Whether it can be looked through before the work: a file, no pipe."""
        return self._path is not None and self._path.is_file()

    async def items(self, shard: Shard) -> AsyncGenerator[Item, None]:
        """The lines of ``shard`` that are not blank.

        Raises:
            DataError: the gzip data is damaged or cut off, or reading fails. The lines before have been given.
            ConfigurationError: the file cannot be opened.
        """
        self.lines_seen = 0
        async with aclosing(self._lines()) as lines:
            async for number, raw in lines:
                self.lines_seen += 1
                if shard.holds(number):
                    yield self._parse(number, raw)

    async def _lines(self) -> AsyncGenerator[tuple[int, bytes | None], None]:
        with self._opened() as file:
            reader, unpack, cut = _Reader(file, self.name), Gunzip(self.name), Lines()
            while data := await reader.read():
                for line in cut.feed(unpack.feed(data)):
                    yield line
            for line in [*cut.feed(unpack.finish()), *cut.finish()]:
                yield line

    @contextmanager
    def _opened(self) -> Iterator[_Readable]:
        """Unbuffered, so that what is there can be had without waiting until a buffer is full."""
        if self._path is None:
            yield getattr(sys.stdin.buffer, "raw", sys.stdin.buffer)
            return
        try:
            file = self._path.open("rb", buffering=0)
        except FileNotFoundError:
            raise ConfigurationError(f"no such file: {self.name}") from None
        except OSError as error:
            raise ConfigurationError(f"cannot read {self.name}: {error.strerror}") from None
        with file:
            yield file

    def _parse(self, number: int, raw: bytes | None) -> Item:
        where = f"{self.name}:{number}"
        try:
            if raw is None:
                raise DataError(f"{where}: longer than {LONGEST // 2**20} MiB")
            record = parse_object(raw, where)
            prompt = parse_prompt(record, number, where)
            overrides = _overrides(record, where)
            return Item(number, where, prompt, _with(self._sampling, overrides, where), _digest(prompt, overrides))
        except DataError as error:
            return Item(number, where, None, self._sampling, error=error)


class Gunzip:
    """Passes bytes through, unpacked if they begin like gzip; several members in a row are one stream."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._head = b""
        self._sniffed = False
        self._inflate: zlib._Decompress | None = None

    def feed(self, data: bytes) -> bytes:
        """What ``data`` unpacks to so far.

        Raises:
            DataError: the gzip data is damaged.
        """
        if not self._sniffed:
            self._head += data
            if len(self._head) < len(GZIP):
                return b""
            self._sniffed, data = True, self._head
            self._inflate = zlib.decompressobj(GZIP_WINDOW) if data.startswith(GZIP) else None
        return data if self._inflate is None else b"".join(self._unpack(data))

    def finish(self) -> bytes:
        """The rest.

        Raises:
            DataError: the gzip data ends too early.
        """
        if self._inflate is not None and not self._inflate.eof:
            raise DataError(f"{self._name}: the gzip data is cut off")
        return b"" if self._sniffed else self._head

    def _unpack(self, data: bytes) -> Iterator[bytes]:
        try:
            while data:
                if self._inflate is None or self._inflate.eof:
                    data = data.lstrip(b"\0")
                    self._inflate = zlib.decompressobj(GZIP_WINDOW)
                yield self._inflate.decompress(data)
                data = self._inflate.unused_data
        except zlib.error:
            raise DataError(f"{self._name}: the gzip data is damaged") from None


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes | None: ...

    def fileno(self) -> int: ...


class _Reader:
    """Waits for a pipe without blocking the loop; a file never makes one wait."""

    def __init__(self, file: _Readable, name: str) -> None:
        self._file, self._name = file, name
        self._waits = True

    async def read(self) -> bytes:
        """At most 64 KiB that are there; none at the end."""
        if self._waits:
            try:
                await anyio.wait_readable(self._file.fileno())
            except (OSError, ValueError):
                self._waits = False
        try:
            return self._file.read(_READ) or b""
        except OSError as error:
            raise DataError(f"{self._name}: reading failed: {error.strerror}") from None


_NUMBER = (int, float)
_FIELDS: dict[str, tuple[type, ...]] = {
    "max_new_tokens": (int,),
    "temperature": _NUMBER,
    "top_p": _NUMBER,
    "seed": (int,),
    "stop": (str, list),
}


def _overrides(record: Record, where: str) -> dict[str, Any]:
    """The line's own ``sampling``; how answers are checked is nothing that data may say."""
    fields = record.get("sampling", {})
    if not isinstance(fields, dict):
        raise DataError(f"{where}: 'sampling' must be an object with {', '.join(_FIELDS)}")
    for name, value in fields.items():
        if name not in _FIELDS:
            raise DataError(f"{where}: 'sampling' has no {name!r}; known are {', '.join(_FIELDS)}")
        if isinstance(value, bool) or not isinstance(value, _FIELDS[name]):
            raise DataError(f"{where}: {name!r} in 'sampling' has the wrong kind of value")
    return fields


def _with(sampling: Sampling, overrides: dict[str, Any], where: str) -> Sampling:
    stop = overrides.get("stop", sampling.stop)
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(text, str) for text in stops):
        raise DataError(f"{where}: 'stop' in 'sampling' must be a text or a list of texts")
    try:
        return replace(sampling, **overrides | {"stop": stops})
    except ConfigurationError as error:
        raise DataError(f"{where}: {error}") from None


def _digest(prompt: Prompt, overrides: dict[str, Any]) -> str:
    content = [[[message.role, message.content] for message in prompt.messages], overrides]
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()
