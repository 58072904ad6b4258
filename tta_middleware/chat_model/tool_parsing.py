"""Tool calls in a model's text: incremental parsers for the formats that chat templates teach. Pure: no I/O.

A parser is fed text in any chunks and gives pieces: text as soon as it is certain that no call begins in it, and calls
whole, since part of one is of no use. How the text is chunked changes neither the calls nor the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from tta_middleware.chat_model.tool_values import plain_json, read_json, typed_arguments
from tta_middleware.tool_forms import TOOL_FORMS, ToolForm, begun_mark
from tta_middleware.types import ToolFormat

# A JSON string, closed or not: what looks like the end of a call may be inside one.
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)
# How an answer begins that may be a call without a mark, and such an answer in a code fence.
_BARE_BEGINNINGS = ("{", "```json")
_FENCED = re.compile(r"```json\s*(.*?)\s*```", re.DOTALL)
_BETWEEN_CALLS = re.compile(r"[\s;`]*")


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


def tool_parser(
    kind: ToolFormat | None, names: Collection[str] = (), tools: Sequence[Mapping[str, Any]] = ()
) -> ToolParser:
    """The parser of a format; None is text without tools, which passes as it is.

    Args:
        names: of the tools that an answer may call without any mark.
        tools: their descriptions in OpenAI's form, by which tagged values are typed.
    """
    if kind is None:
        return PlainParser()
    form = TOOL_FORMS[kind]
    reader = CallReader(form, tools)
    marked = MarkedParser(form, reader) if form.close else TailParser(form.open, reader)
    return BareParser(marked, None if kind == "llama" else names)


def opening(kind: ToolFormat, name: str | None = None) -> str:
    """What an answer begins with that is a call: of that tool, or of any.

    It ends where a tokenizer would end a token, so that the model goes on as it would have by itself.
    """
    form = TOOL_FORMS[kind]
    begin, behind = form.opening
    if form.named:
        return begin if name is None else f"{begin}{name}{behind}"
    return f'{begin}"name": "' if name is None else f'{begin}"name": {json.dumps(name)}, "{behind}":'


class PlainParser:
    """Text that holds no calls."""

    open = False

    def feed(self, text: str) -> list[Piece]:
        return [text] if text else []

    def finish(self) -> list[Piece]:
        return []


class MarkedParser:
    """Stretches of calls between two marks, any number of them."""

    def __init__(self, form: ToolForm, reader: CallReader) -> None:
        self._form, self._reader = form, reader
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
            body, close, rest = self._held.partition(self._form.close)
            pieces += self._reader.calls(body, self._form.open, close)
            self._inside, self._held = False, rest
            pieces += self._drain()
        return [*pieces, *self._prose.take(self._held), *self._prose.rest()]

    def _drain(self) -> Iterator[Piece]:
        while True:
            if self._inside:
                end = self._reader.end(self._held)
                if end is None:
                    return
                close = self._form.close
                yield from self._reader.calls(self._held[: end - len(close)], self._form.open, close)
                self._held, self._inside = self._held[end:], False
            else:
                before, mark, self._held = _split_at(self._held, (self._form.open, *self._form.around))
                self._inside = mark == self._form.open
                yield from self._prose.take(before, called=bool(mark))
                if not mark:
                    return


class TailParser:
    """A mark, and calls from there to the end: Mistral's ``[TOOL_CALLS]``, Llama's ``<|python_tag|>``."""

    def __init__(self, mark: str, reader: CallReader) -> None:
        self._mark, self._reader = mark, reader
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
        before, mark, self._held = _split_at(self._held, (self._mark,))
        self._inside = bool(mark)
        return self._prose.take(before, called=self._inside)

    def finish(self) -> list[Piece]:
        if self._inside:
            return self._reader.calls(self._held, self._mark)
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


class CallReader:
    """The calls of one marked stretch of a form: all of them or none."""

    def __init__(self, form: ToolForm, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        self._form, self._tools = form, tools
        self._ends = re.compile(form.ends, re.DOTALL) if form.ends else None
        quote = re.escape(form.quote)
        self._string = re.compile(rf"{quote}.*?(?:{quote}|\Z)", re.DOTALL) if quote else _STRING

    def end(self, text: str) -> int | None:
        """Behind the first mark that ends the stretch; one inside a value does not."""
        close = self._form.close
        if close not in text:
            return None
        if self._ends is not None:
            found = self._ends.search(text)
            return found.end() if found else None
        # Strings are blanked at equal length, so that positions stay.
        at = self._string.sub(lambda found: " " * len(found[0]), text).find(close)
        return at + len(close) if at >= 0 else None

    def calls(self, body: str, mark: str, close: str = "") -> list[Piece]:
        """What is between ``mark`` and ``close``; JSON with a name is read in any form."""
        form = self._form
        if body.lstrip().startswith(("{", "[{")) or not form.named:
            return read_calls(body, mark, close)
        try:
            return list(self._tagged(body) if form.call else self._headed(body))
        except (ValueError, RecursionError):
            return [BrokenCall(mark + body + close)]

    def _tagged(self, body: str) -> Iterator[Piece]:
        if not body.strip():
            raise ValueError("no call")
        for name, arguments in _all_of(self._form.call, body):
            values = dict(_all_of(self._form.argument, arguments))
            yield ParsedCall(name, typed_arguments(values, name, self._tools))

    def _headed(self, body: str) -> Iterator[Piece]:
        head, at = re.compile(self._form.head), 0
        if not body.strip():
            raise ValueError("no call")
        if self._form.quote:
            # Names hold none of the signs that are changed.
            found = head.match(body)
            begin = found.end() if found else 0
            body = body[:begin] + plain_json(body[begin:], self._form.quote)
        while at < len(body):
            if (found := head.match(body, at)) is None:
                raise ValueError("a call needs a name")
            arguments, end = read_json(body, found.end())
            if not isinstance(arguments, dict):
                raise ValueError("a call needs arguments")
            yield ParsedCall(found[1], arguments)
            at = _between(body, end)


def _all_of(pattern: str, text: str) -> Iterator[tuple[str, str]]:
    """The two groups of every match, which have to follow one another from end to end."""
    expression, at = re.compile(pattern, re.DOTALL), 0
    while text[at:].strip():
        if (found := expression.match(text, at)) is None:
            raise ValueError("not of this form")
        yield found[1].strip(), found[2]
        at = found.end()


def read_calls(body: str, mark: str = "", close: str = "") -> list[Piece]:
    """Calls as JSON objects, or lists of them; all of it or none."""
    try:
        return [_call(value, bare=not mark) for value in _values(body)]
    except (ValueError, RecursionError):
        return [BrokenCall(mark + body + close)]


def _values(body: str) -> Iterator[Any]:
    at = _between(body, 0)
    if at == len(body):
        raise ValueError("no JSON")
    while at < len(body):
        value, end = read_json(body, at)
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


def _split_at(text: str, marks: tuple[str, ...]) -> tuple[str, str, str]:
    """Text before the first of the marks, that mark or nothing, and what follows.

    An end that may begin a mark is held as what follows.
    """
    found = min(((at, mark) for mark in marks if (at := text.find(mark)) >= 0), default=None)
    if found is not None:
        at, mark = found
        return text[:at], mark, text[at + len(mark) :]
    held = begun_mark(text, marks)
    return text[: len(text) - held], "", text[len(text) - held :]


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
