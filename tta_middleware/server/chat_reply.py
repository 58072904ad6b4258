"""A chat model's messages as OpenAI's completions and chunks."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from langchain_core.messages import AIMessage, AIMessageChunk

from tta_middleware.call_text import call_text
from tta_middleware.chat_model.messages import REASONING
from tta_middleware.chat_model.refusal import REFUSAL
from tta_middleware.types import SEAM

_DETAILS = "completion_tokens_details"


@dataclass(slots=True)
class Reply:
    """One answer on its way out; what has come is noted for its last chunks and for the log.

    Attributes:
        model: the name that the client used.
        show_trace: whether the trace leaves, too.
        several: it is one of several choices, so that what is told of it alone stands in its choice.
        parsed: its text is to be JSON, so that no notice may stand in it.
        said: what has left, piece by piece; calls decoded.
    """

    model: str
    show_trace: bool
    index: int = 0
    several: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(14)}")
    created: int = field(default_factory=lambda: int(time.time()))
    metadata: dict[str, Any] = field(default_factory=dict)
    usage: dict[str, Any] | None = None
    said: list[str] = field(default_factory=list)
    parsed: bool = False
    _calls: int = 0

    def sibling(self, index: int) -> Reply:
        """Another choice of the same completion."""
        return Reply(self.model, self.show_trace, index, self.several, self.id, self.created, parsed=self.parsed)

    def choice(self, message: AIMessage) -> dict[str, Any]:
        """The whole answer."""
        pieces = self._heard(message)
        calls = [piece.as_dict() for piece in pieces if isinstance(piece, _Call)]
        text = "".join(piece for piece in pieces if isinstance(piece, str))
        text = self.unrefused(text) if self.parsed else text
        return {
            "index": self.index,
            "message": {
                "role": "assistant",
                "content": text or (None if calls or (self.parsed and self.refusal) else ""),
                "refusal": self.refusal,
                **_thought(message),
                **({"tool_calls": calls} if calls else {}),
            },
            "logprobs": None,
            "finish_reason": self.finish_reason,
            **self._inner_trace,
        }

    def note(self, message: AIMessage) -> None:
        """Remember what a message, or a stream's chunk, says beside its text."""
        self.metadata |= message.response_metadata
        if tokens := message.usage_metadata:
            self.usage = {
                "prompt_tokens": tokens["input_tokens"],
                "completion_tokens": tokens["output_tokens"],
                "total_tokens": tokens["total_tokens"],
            }
            thought = tokens.get("output_token_details", {}).get("reasoning")
            if thought is not None:
                self.usage[_DETAILS] = {"reasoning_tokens": thought}

    def deltas(self, message: AIMessage) -> list[dict[str, Any]]:
        """What a stream's chunk adds, or a message where the model gives one piece; calls come whole."""
        thought = _thought(message)
        return [*([thought] if thought else []), *(self._delta(piece) for piece in self._heard(message))]

    def _delta(self, piece: str | _Call) -> dict[str, Any]:
        if isinstance(piece, str):
            return {"content": piece}
        index, self._calls = self._calls, self._calls + 1
        return {"tool_calls": [{"index": index, **piece.as_dict()}]}

    def _heard(self, message: AIMessage) -> list[str | _Call]:
        pieces = _pieces(message)
        self.said += [piece if isinstance(piece, str) else piece.text for piece in pieces]
        return pieces

    def moderated_text(self) -> str:
        """What has left, for a moderator: text as it was, calls decoded on lines of their own."""
        return ("\n" if self._has_calls else "").join(self.said)

    def chunk(self, delta: Mapping[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        """A piece of the stream."""
        choice = {"index": self.index, "delta": dict(delta), "logprobs": None, "finish_reason": finish_reason}
        choice |= self._inner_trace if finish_reason else {}
        return self.about("chat.completion.chunk") | {"choices": [choice]}

    def last_chunk(self) -> dict[str, Any]:
        """Why the answer ended, and the trace."""
        delta = {"refusal": self.refusal} if self.refusal else {}
        return self.chunk(delta, self.finish_reason) | self.outer_trace

    def extra_chunk(self, **fields: Any) -> dict[str, Any]:
        """What follows the answer: usage, moderation."""
        return self.about("chat.completion.chunk") | {"choices": []} | fields

    @property
    def _has_calls(self) -> bool:
        return self.finish_reason == "tool_calls"

    @property
    def finish_reason(self) -> str:
        return str(self.metadata.get("finish_reason") or "stop")

    @property
    def refusal(self) -> str | None:
        return self.metadata.get(REFUSAL)

    def unrefused(self, text: str) -> str:
        """A text without the notice at its end."""
        if self.refusal and text.endswith(self.refusal):
            return text.removesuffix(self.refusal).removesuffix(SEAM)
        return text

    @property
    def trace(self) -> dict[str, Any]:
        """What the guard tells of the answer; empty for one out of a cache."""
        return self.metadata.get("tta") or {}

    @property
    def outer_trace(self) -> dict[str, Any]:
        """The trace as a field of the completion, or of the last chunk; of several choices each has its own."""
        return {} if self.several else self._trace

    @property
    def _inner_trace(self) -> dict[str, Any]:
        return self._trace if self.several else {}

    @property
    def _trace(self) -> dict[str, Any]:
        return {"tta": self.trace} if self.show_trace and self.trace else {}

    def about(self, kind: str) -> dict[str, Any]:
        """What a completion or a chunk begins with."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def usage_of(replies: Sequence[Reply]) -> dict[str, Any] | None:
    """Of all choices together, as OpenAI counts: what was decoded adds up, and the prompt counts once."""
    known = [reply.usage for reply in replies if reply.usage is not None]
    if len(known) < 2:
        return known[0] if known else None
    prompt, completion = max(one["prompt_tokens"] for one in known), sum(one["completion_tokens"] for one in known)
    told = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    thought = [one["completion_tokens_details"]["reasoning_tokens"] for one in known if _DETAILS in one]
    return told | ({_DETAILS: {"reasoning_tokens": sum(thought)}} if thought else {})


@dataclass(frozen=True, slots=True)
class _Call:
    """A call of a tool, its arguments as JSON."""

    name: str
    arguments: str
    id: str

    @property
    def text(self) -> str:
        try:
            return call_text(self.name, json.loads(self.arguments or "{}"))
        except ValueError:
            return call_text(self.name, self.arguments)

    def as_dict(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def _thought(message: AIMessage) -> dict[str, str]:
    """Thoughts that are shown, in the two fields that servers of this protocol have for them."""
    text = message.additional_kwargs.get(REASONING)
    return {"reasoning_content": text, "reasoning": text} if text else {}


def _pieces(message: AIMessage) -> list[str | _Call]:
    """Text and calls; a broken call is text, since nobody could carry it out."""
    found: list[str | _Call] = [str(message.text)] if message.text else []
    if not isinstance(message, AIMessageChunk):
        found += [call["args"] or "" for call in message.invalid_tool_calls]
        return found + [
            _Call(call["name"], json.dumps(call["args"], ensure_ascii=False), call["id"] or "")
            for call in message.tool_calls
        ]
    for chunk in message.tool_call_chunks:
        name, arguments = chunk["name"], chunk["args"] or ""
        found.append(arguments if name is None else _Call(name, arguments, chunk["id"] or ""))
    return found
