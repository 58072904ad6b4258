"""Checked text to LangChain's chunks: prose as it comes, tool calls whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial, reduce
from operator import add
from typing import Any, Final, cast

from langchain_core.messages import AIMessage, AIMessageChunk, message_chunk_to_message
from langchain_core.messages.tool import tool_call_chunk

from tta_middleware.call_text import (
    begins_as_json,
    call_text,
    decoded_parts,
    decodings,
    escapes_from,
    json_reading,
    whole,
)
from tta_middleware.chat_model.messages import REASONING, metadata, usage
from tta_middleware.chat_model.refusal import REFUSAL, ending
from tta_middleware.chat_model.tool_parsing import BrokenCall, ParsedCall, Piece, tool_parser
from tta_middleware.chat_model.tools import ToolUse
from tta_middleware.guard.holdback import Reading
from tta_middleware.types import SEAM, Channel, GuardedAnswer

_BEGINNING: Final = 64
"""Characters by which an answer is told to be JSON."""


class AnswerReader:
    """Reads one answer, which comes as pieces of checked text and then as a whole.

    Args:
        use: the tools that the model was shown; None reads everything as text.
        call_id: the id of the answer's n-th call.
        notice: the text that stands for a refusal.
        parsed: the text is to be JSON. What stands in for the rest of an answer that has begun is then told as a
            refusal and not in the text, where a parser would take it for the end of a string. So it is where the text
            begins as JSON.
    """

    def __init__(
        self, use: ToolUse | None, call_id: Callable[[int], str], notice: str = "", *, parsed: bool = False
    ) -> None:
        self._notice, self._parsed = notice, parsed
        self._said = self._held = ""
        self._parser = tool_parser(use.kind, use.names, use.tools) if use else tool_parser(None)
        self._opening = use.opening if use else ""
        self._most = None if use is None or use.parallel else 1
        self._call_id = call_id
        self._calls = 0
        self._callable = self._spoken = False
        self._last = ""

    def feed(self, text: str, channel: Channel = "answer") -> list[AIMessageChunk]:
        """The chunks that became certain. LangChain makes reasoning blocks of what they have in addition."""
        if channel == "reasoning":
            return [AIMessageChunk(content="", additional_kwargs={REASONING: text})] if text else []
        if text.startswith(SEAM) and self._said and (self._parsed or begins_as_json(self._said)):
            text, self._held = self._held, text  # whether it is JSON still shows with what comes next
        else:
            text, self._held = self._held + text, ""
        self._last, self._said = text, (self._said + text)[:_BEGINNING]
        text, self._opening = self._opening + text, ""
        return self._chunks(self._parser.feed(text))

    def finish(self, answer: GuardedAnswer) -> list[AIMessageChunk]:
        """The rest; the metadata stands on one chunk only, since strings would concatenate on merge."""
        blocked, refusal = answer.finish_reason == "content_filter", None
        held, self._held = self._held, ""
        if blocked and self._parser.open:
            # A call was cut off and the notice stands behind it; the call is of no use.
            instead = held or self._last
            rest = self._chunks([instead if self._spoken else instead.strip()])
        elif blocked:
            rest, refusal = self._chunks(self._parser.finish()), held.removeprefix(SEAM)
        else:
            rest = self._chunks([*self._parser.feed(held), *self._parser.finish()])
        about = self._metadata(answer) | ({REFUSAL: refusal} if refusal else {})
        end = AIMessageChunk(content="", response_metadata=about, usage_metadata=usage(answer), chunk_position="last")
        return [*rest, end]

    def read(self, answer: GuardedAnswer) -> AIMessage:
        """The whole answer as one message."""
        chunks = [*self.feed(answer.reasoning, "reasoning"), *self.feed(answer.text), *self.finish(answer)]
        return cast(AIMessage, message_chunk_to_message(reduce(add, chunks)))

    def _metadata(self, answer: GuardedAnswer) -> dict[str, Any]:
        called = self._callable and answer.finish_reason == "stop"
        # A fallback's own words are an answer; only the notice is a refusal.
        refused = answer.finish_reason == "content_filter" and self._notice and answer.text.endswith(self._notice)
        about = metadata(answer) | ending("tool_calls" if called else answer.finish_reason)
        return about | ({REFUSAL: self._notice} if refused else {})

    def _chunks(self, pieces: list[Piece]) -> list[AIMessageChunk]:
        return [self._chunk(piece) for piece in pieces if piece and not self._surplus(piece)]

    def _surplus(self, piece: Piece) -> bool:
        return not isinstance(piece, str) and self._calls == self._most

    def _chunk(self, piece: Piece) -> AIMessageChunk:
        if isinstance(piece, str):
            self._spoken = True
            return AIMessageChunk(content=piece)
        index, self._calls = self._calls, self._calls + 1
        self._callable = self._callable or isinstance(piece, ParsedCall)
        name, args = _written(piece)
        chunk = tool_call_chunk(name=name, args=args, id=self._call_id(index), index=index)
        return AIMessageChunk(content="", tool_call_chunks=[chunk])


def _written(piece: ParsedCall | BrokenCall) -> tuple[str | None, str]:
    """Name and arguments; a broken call keeps its mark, by which LangChain sees that it is no JSON."""
    if isinstance(piece, BrokenCall):
        return None, piece.text
    return piece.name, whole(json.dumps(piece.arguments, ensure_ascii=False))


def reading_of(use: ToolUse | None) -> Reading:
    """What :class:`AnswerReader` makes of an answer, and parsers of what it gives, for the moderator to judge."""
    return json_reading if use is None else partial(_decoded, use)


def _decoded(use: ToolUse, text: str, begin: int) -> str | None:
    """What the message says that ``text`` does not from ``begin`` on: of all that ends there, calls always whole.

    A call that is not over, or is broken, has its escapes decoded as far as it goes: what it says must not leave the
    guard either, since a repair goes on from there.
    """
    parser, written = tool_parser(use.kind, use.names, use.tools), use.opening + text[begin:]
    before = _prose(parser.feed(use.opening + text[:begin]))
    pieces, inside = parser.feed(text[begin:]), parser.open
    rest = parser.finish()
    pieces += rest
    # A reader sees what stands before a call next to what stands behind it, however long that is.
    prose = before[-len(text) + begin :] + _prose(pieces)
    calls = [piece for piece in pieces if isinstance(piece, ParsedCall)]
    found = [call_text(call.name, call.arguments) for call in calls if not _stands(call, written)]
    if prose not in text:
        found.append(prose)
    unread = inside and not any(isinstance(piece, ParsedCall) for piece in rest)
    if unread or any(isinstance(piece, BrokenCall) for piece in pieces):
        found += decodings(escapes_from(text, begin))
    elif decoded := json_reading(prose):
        found.append(decoded)
    return "\n".join(found) or None


def _prose(pieces: Iterable[Piece]) -> str:
    return "".join(piece for piece in pieces if isinstance(piece, str))


def _stands(call: ParsedCall, written: str) -> bool:
    """Whether all that a call says was written as it is, so that nothing is hidden by its encoding."""
    return all(part in written and not decodings(part) for part in decoded_parts({call.name: call.arguments}))
