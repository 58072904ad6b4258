"""Tool calls in a model's text: incremental parsers for the formats that chat templates teach. Pure: no I/O.

A parser is fed text in any chunks and gives pieces: text as soon as it is certain that no call begins in it, and calls
whole, since part of one is of no use. How the text is chunked changes neither the calls nor the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from tta_middleware.types import ToolFormat

HERMES_OPEN, HERMES_CLOSE = "<tool_call>", "</tool_call>"
MISTRAL_OPEN = "[TOOL_CALLS]"
LLAMA_OPEN = "<|python_tag|>"

# A JSON string, closed or not: what looks like the end of a call may be inside one.
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)
# How an answer begins that may be a call without a mark, and such an answer in a code fence.
_BARE_BEGINNINGS = ("{", "```json")
_FENCED = re.compile(r"```json\s*(.*?)\s*```", re.DOTALL)
_BETWEEN_CALLS = re.compile(r"[\s;]*")


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """One call that can be carried out."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class BrokenCall:
    """What was marked as a call and cannot be read as one, with the mark it began with."""

    text: str


Piece: TypeAlias = str | ParsedCall | BrokenCall


class ToolParser(Protocol):
    """Text in, pieces out."""

    @property
    def open(self) -> bool:
        """Whether a call has begun and not ended."""
        ...

    def feed(self, text: str) -> list[Piece]:
        """What became certain with this text."""
        ...

    def finish(self) -> list[Piece]:
        """The rest; the parser is used up."""
        ...


def tool_parser(kind: ToolFormat | None, names: Collection[str] = ()) -> ToolParser:
    """The parser of a format for tools of these names; None is text without tools, which passes as it is."""
    match kind:
        case None:
            return PlainParser()
        case "hermes":
            return BareParser(HermesParser(), names)
        case "mistral":
            return BareParser(TailParser(MISTRAL_OPEN), names)
        case "llama":
            return BareParser(TailParser(LLAMA_OPEN), None)


def opening(kind: ToolFormat, name: str | None = None) -> str:
    """What an answer begins with that is a call: of that tool, or of any.

    It ends where a tokenizer would end a token, so that the model goes on as it would have by itself.
    """
    start = {"hermes": f"{HERMES_OPEN}\n{{", "mistral": f"{MISTRAL_OPEN} [{{", "llama": "{"}[kind]
    if name is None:
        return f'{start}"name": "'
    key = "parameters" if kind == "llama" else "arguments"
    return f'{start}"name": {json.dumps(name)}, "{key}":'


class PlainParser:
    """Text that holds no calls."""

    open = False

    def feed(self, text: str) -> list[Piece]:
        return [text] if text else []

    def finish(self) -> list[Piece]:
        return []


class HermesParser:
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, any number: Hermes, Qwen 2.5 and 3."""

    def __init__(self) -> None:
        self._prose = _Prose()
        self._held = ""
        self._inside = False

    @property
    def open(self) -> bool:
        return self._inside

    def feed(self, text: str) -> list[Piece]:
        self._held += text
        return list(self._drain())

    def finish(self) -> list[Piece]:
        pieces = list(self._drain())
        while self._inside:
            # The end is missing, or a string before it has none: then the first mark that looks like it counts.
            body, close, rest = self._held.partition(HERMES_CLOSE)
            pieces += read_calls(body, HERMES_OPEN, close)
            self._inside, self._held = False, rest
            pieces += self._drain()
        return [*pieces, *self._prose.take(self._held), *self._prose.rest()]

    def _drain(self) -> Iterator[Piece]:
        while True:
            if self._inside:
                end = _end_of_json(self._held, HERMES_CLOSE)
                if end is None:
                    return
                yield from read_calls(self._held[:end], HERMES_OPEN, HERMES_CLOSE)
                self._held, self._inside = self._held[end + len(HERMES_CLOSE) :], False
            else:
                before, self._held, self._inside = _split_at(self._held, HERMES_OPEN)
                yield from self._prose.take(before, called=self._inside)
                if not self._inside:
                    return


class TailParser:
    """A mark, and JSON calls from there to the end: Mistral's ``[TOOL_CALLS]``, Llama's ``<|python_tag|>``."""

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._prose = _Prose()
        self._held = ""
        self._inside = False

    @property
    def open(self) -> bool:
        return self._inside

    def feed(self, text: str) -> list[Piece]:
        self._held += text
        if self._inside:
            return []
        before, self._held, self._inside = _split_at(self._held, self._mark)
        return self._prose.take(before, called=self._inside)

    def finish(self) -> list[Piece]:
        if self._inside:
            return read_calls(self._held, self._mark)
        return [*self._prose.take(self._held), *self._prose.rest()]


class BareParser:
    """Calls without any mark as the whole answer: Llama's own form, and what small models of the others make of it.

    An answer that begins like JSON is held to its end; unless all of it is calls, ``marked`` reads it.

    Args:
        marked: reads every other answer.
        names: tools that may be called so; None for any, where this is the form that the template teaches.
    """

    def __init__(self, marked: ToolParser, names: Collection[str] | None) -> None:
        self._marked, self._names = marked, names
        self._held = ""
        self._passed_on = False

    @property
    def open(self) -> bool:
        return self._marked.open if self._passed_on else self._held.lstrip().startswith(_BARE_BEGINNINGS)

    def feed(self, text: str) -> list[Piece]:
        if self._passed_on:
            return self._marked.feed(text)
        self._held += text
        begun = self._held.lstrip()
        if begun.startswith(_BARE_BEGINNINGS) or any(start.startswith(begun) for start in _BARE_BEGINNINGS):
            return []
        return self._pass_on()

    def finish(self) -> list[Piece]:
        if self._passed_on:
            return self._marked.finish()
        fenced = _FENCED.fullmatch(self._held.strip())
        pieces = read_calls(fenced[1] if fenced else self._held)
        if all(isinstance(piece, ParsedCall) and self._may_call(piece.name) for piece in pieces):
            return pieces
        return [*self._pass_on(), *self._marked.finish()]

    def _may_call(self, name: str) -> bool:
        return self._names is None or name in self._names

    def _pass_on(self) -> list[Piece]:
        self._passed_on = True
        return self._marked.feed(self._held)


def read_calls(body: str, mark: str = "", close: str = "") -> list[Piece]:
    """The calls of one marked stretch: JSON objects, or a list of them; all of it or none."""
    try:
        return [_call(value, bare=not mark) for value in _values(body)]
    except ValueError:
        return [BrokenCall(mark + body + close)]


def _values(body: str) -> Iterator[Any]:
    decoder, at = json.JSONDecoder(strict=False), _between(body, 0)
    if at == len(body):
        raise ValueError("no JSON")
    while at < len(body):
        value, end = decoder.raw_decode(body, at)
        yield from value if isinstance(value, list) else [value]
        at = _between(body, end)


def _between(body: str, at: int) -> int:
    found = _BETWEEN_CALLS.match(body, at)
    return found.end() if found else at


def _call(value: Any, *, bare: bool) -> ParsedCall:
    """``bare``: nothing but its arguments tells a call from other JSON."""
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str) or not name:
        raise ValueError("a call needs a name")
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if arguments is None and not bare:
        arguments = {}
    if not isinstance(arguments, dict):
        raise ValueError("a call needs arguments")
    return ParsedCall(name, arguments)


def _end_of_json(text: str, close: str) -> int | None:
    """Where ``close`` first stands outside a JSON string."""
    at = text.find(close)
    if at < 0:
        return None
    # Strings are blanked at equal length, so that positions stay.
    at = _STRING.sub(lambda found: " " * len(found[0]), text).find(close)
    return at if at >= 0 else None


def _split_at(text: str, mark: str) -> tuple[str, str, bool]:
    """Text before the mark, what follows it, and whether it is there; an end that may begin it is held as well."""
    before, found, after = text.partition(mark)
    if found:
        return before, after, True
    sizes = range(min(len(mark) - 1, len(text)), 0, -1)
    held = next((size for size in sizes if mark.startswith(text[-size:])), 0)
    return text[: len(text) - held], text[len(text) - held :], False


class _Prose:
    """Text around calls: white space goes out with what follows it, and not at all beside a call."""

    def __init__(self) -> None:
        self._space = ""
        self._called = False

    def take(self, text: str, *, called: bool = False) -> list[Piece]:
        text = self._space + text
        kept = text.rstrip()
        self._space = "" if called else text[len(kept) :]
        self._called = self._called or called
        return [kept] if kept else []

    def rest(self) -> list[Piece]:
        return [self._space] if self._space and not self._called else []
