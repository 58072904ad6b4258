"""A chat model's messages as OpenAI's completions and chunks."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from langchain_core.messages import AIMessage, AIMessageChunk

from tta_middleware.call_text import call_text
from tta_middleware.chat_model.refusal import REFUSAL


@dataclass(slots=True)
class Reply:
    """One answer on its way out; what has come is noted for its last chunks and for the log.

    Attributes:
        model: the name that the client used.
        show_trace: whether the trace leaves, too.
        said: what has left, calls decoded.
    """

    model: str
    show_trace: bool
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(14)}")
    created: int = field(default_factory=lambda: int(time.time()))
    metadata: dict[str, Any] = field(default_factory=dict)
    usage: dict[str, int] | None = None
    said: list[str] = field(default_factory=list)
    _calls: int = 0

    def completion(self, message: AIMessage, moderation: Mapping[str, Any] | None) -> dict[str, Any]:
        """The whole answer."""
        calls = [
            _call(one["name"], json.dumps(one["args"], ensure_ascii=False), one["id"]) for one in message.tool_calls
        ]
        text = _text_of(message)
        choice = {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": text or (None if calls else ""),
                "refusal": self.refusal,
                **({"tool_calls": calls} if calls else {}),
            },
            "logprobs": None,
            "finish_reason": self.finish_reason,
        }
        about = self._about("chat.completion") | {"choices": [choice], "usage": self.usage} | self._trace
        return about | ({"moderation": dict(moderation)} if moderation else {})

    def note(self, message: AIMessage) -> None:
        """Remember what a message, or a stream's chunk, says beside its text, and what it says for a moderator."""
        self.metadata |= message.response_metadata
        if tokens := message.usage_metadata:
            self.usage = {
                "prompt_tokens": tokens["input_tokens"],
                "completion_tokens": tokens["output_tokens"],
                "total_tokens": tokens["total_tokens"],
            }
        if not isinstance(message, AIMessageChunk):
            self.said += [call_text(call["name"], call["args"]) for call in message.tool_calls]
        if text := _text_of(message):
            self.said.append(text)

    def deltas(self, chunk: AIMessageChunk) -> list[dict[str, Any]]:
        """What a stream's chunk adds; calls come whole."""
        found: list[dict[str, Any]] = [{"content": str(chunk.text)}] if chunk.text else []
        for call in chunk.tool_call_chunks:
            if call["name"] is None:  # a broken call is text: nobody could carry it out
                found.append({"content": call["args"] or ""})
                self.said.append(call["args"] or "")
                continue
            found.append(
                {"tool_calls": [{"index": self._calls, **_call(call["name"], call["args"] or "", call["id"])}]}
            )
            self.said.append(call_text(call["name"], _read(call["args"])))
            self._calls += 1
        return found

    def chunk(self, delta: Mapping[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        """A piece of the stream."""
        choice = {"index": 0, "delta": dict(delta), "logprobs": None, "finish_reason": finish_reason}
        return self._about("chat.completion.chunk") | {"choices": [choice]}

    def last_chunk(self) -> dict[str, Any]:
        """Why the answer ended, and the trace."""
        delta = {"refusal": self.refusal} if self.refusal else {}
        return self.chunk(delta, self.finish_reason) | self._trace

    def extra_chunk(self, **fields: Any) -> dict[str, Any]:
        """What follows the answer: usage, moderation."""
        return self._about("chat.completion.chunk") | {"choices": []} | fields

    @property
    def has_calls(self) -> bool:
        """Whether some of what was said are calls, which stand on lines of their own."""
        return self.finish_reason == "tool_calls"

    @property
    def finish_reason(self) -> str:
        return str(self.metadata.get("finish_reason") or "stop")

    @property
    def refusal(self) -> str | None:
        return self.metadata.get(REFUSAL)

    @property
    def trace(self) -> dict[str, Any]:
        """What the guard tells of the answer; empty for one out of a cache."""
        return self.metadata.get("tta") or {}

    @property
    def _trace(self) -> dict[str, Any]:
        return {"tta": self.trace} if self.show_trace and self.trace else {}

    def _about(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def _text_of(message: AIMessage) -> str:
    """Its text; of a whole message also the calls that are broken, which nobody could carry out."""
    if isinstance(message, AIMessageChunk):
        return str(message.text)
    return str(message.text) + "".join(call["args"] or "" for call in message.invalid_tool_calls)


def _call(name: str, arguments: str, call_id: str | None) -> dict[str, Any]:
    return {"id": call_id or "", "type": "function", "function": {"name": name, "arguments": arguments}}


def _read(arguments: str | None) -> Any:
    try:
        return json.loads(arguments or "{}")
    except ValueError:
        return arguments
