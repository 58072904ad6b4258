"""Reads the prompts of a batch, line by line as they arrive: from a file or a pipe, gzip or not."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tta_middleware.batch.shard import STDIO, Shard
from tta_middleware.errors import ConfigurationError, DataError
from tta_middleware.files.gzip import Gunzip, Readable, Reader
from tta_middleware.files.jsonl import Record, parse_object
from tta_middleware.files.lines import LONGEST, Lines
from tta_middleware.files.prompts import Prompt, parse_prompt
from tta_middleware.types import Sampling


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
        sampling: what a line's own ``sampling`` overrides; without a seed of its own a line has draws of its own.

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

    def check_there(self) -> None:
        """Raises ConfigurationError if nothing is there to be read; before a model is loaded for it."""
        if self._path is not None and not self._path.exists():
            raise ConfigurationError(f"no such file: {self.name}")
        if self._path is not None and self._path.is_dir():
            raise ConfigurationError(f"{self.name} is a folder; give a file with one JSON object a line")

    async def items(self, shard: Shard) -> AsyncGenerator[Item, None]:
        """The lines of ``shard`` that are not blank.

        Raises:
            DataError: the gzip data is damaged or cut off, or reading fails. The lines before the faulty block were
                given.
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
            reader, unpack, cut = Reader(file, self.name), Gunzip(self.name), Lines()
            while data := await reader.read():
                for line in cut.feed(unpack.feed(data)):
                    yield line
            for line in [*cut.feed(unpack.finish()), *cut.finish()]:
                yield line

    @contextmanager
    def _opened(self) -> Iterator[Readable]:
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
            sampling = _with(self._sampling.apart(str(prompt.id)), overrides, where)
            return Item(number, where, prompt, sampling, _digest(prompt, overrides))
        except DataError as error:
            return Item(number, where, None, self._sampling, error=error)


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
    if "max_tokens" in fields:  # the name that chat models and the server understand, too
        fields = dict(fields)
        tokens = fields.pop("max_tokens")
        if fields.setdefault("max_new_tokens", tokens) != tokens:
            raise DataError(f"{where}: 'max_tokens' in 'sampling' is another name of 'max_new_tokens'; give one")
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
    except OverflowError:
        raise DataError(f"{where}: a number in 'sampling' is too large") from None


def _digest(prompt: Prompt, overrides: dict[str, Any]) -> str:
    content = [[[message.role, message.content] for message in prompt.messages], overrides]
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()
