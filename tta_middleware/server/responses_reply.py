"""An answer as OpenAI's Responses API has it: one object, or the events that build it up.

Source of shapes and events: the types of the ``openai`` client (``openai.types.responses``).
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from langchain_core.messages import AIMessage

from tta_middleware.server.answers import Answer, WithoutNotice
from tta_middleware.server.responses_request import ResponseRequest

_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}


@dataclass(eq=False, slots=True)
class ResponseReply:
    """One response on its way out; its own task alone writes it.

    The notice of a block is no text of the answer but a ``refusal`` part beside it, so that whoever parses the text as
    JSON does not meet it there.
    """

    answer: Answer
    asked: ResponseRequest
    id: str = field(default_factory=lambda: f"resp_{secrets.token_hex(24)}")
    output: list[dict[str, Any]] = field(default_factory=list)
    _events: int = 0
    _open: bool = False
    _text: WithoutNotice = field(init=False)

    def __post_init__(self) -> None:
        self._text = WithoutNotice(self.answer)

    def take(self, message: AIMessage) -> None:
        """All of the answer at once."""
        for _ in (*self.pieces(message), *self.end()):
            pass

    def begin(self) -> Iterator[dict[str, Any]]:
        """What a stream begins with."""
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self.response("in_progress"))

    def pieces(self, message: AIMessage) -> Iterator[dict[str, Any]]:
        """What a piece of the answer adds."""
        for delta in self.answer.reply.deltas(message):
            for text in self._text.take(delta["content"]) if delta.get("content") else ():
                if text:
                    yield from self._said(text)
            for call in delta.get("tool_calls") or ():
                yield from self._called(call["id"], call["function"])

    def end(self) -> Iterator[dict[str, Any]]:
        """What is left once the model has ended; the last event has all of the response."""
        refusal = self.answer.reply.refusal
        for text in self._text.rest():
            yield from self._said(text)
        if not self.output and refusal is None:
            yield from self._said("")
        if refusal is not None:
            yield from self._refused(refusal)
        yield from self._close()

    def last(self, moderation: Mapping[str, Any] | None) -> dict[str, Any]:
        """The event that ends a stream."""
        return self._event(f"response.{self.status}", response=self.finished(moderation))

    def finished(self, moderation: Mapping[str, Any] | None) -> dict[str, Any]:
        """The object once it is all there; ``moderation`` as chat completions have it."""
        told = self.response(self.status)
        if moderation is not None:
            told["moderation"] = {name: _alone(found) for name, found in moderation.items()}
        return told

    @property
    def status(self) -> str:
        return "incomplete" if self.answer.reply.finish_reason in _INCOMPLETE else "completed"

    def response(self, status: str) -> dict[str, Any]:
        """The object as it is now."""
        asked, reply = self.asked, self.answer.reply
        reason = _INCOMPLETE.get(reply.finish_reason) if status == "incomplete" else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": reply.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": reason} if reason else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": asked.model,
            "output": list(self.output),
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": asked.temperature,
            "text": {"format": (asked.text.format if asked.text else None) or {"type": "text"}},
            "tool_choice": asked.tool_choice or "auto",
            "tools": [_described(tool.model_dump()) for tool in asked.tools or ()],
            "top_p": asked.top_p,
            "truncation": "disabled",
            "usage": _usage(reply.usage) if status != "in_progress" else None,
            **({"tta": reply.trace} if status != "in_progress" and reply.show_trace and reply.trace else {}),
        }

    def _said(self, text: str) -> Iterator[dict[str, Any]]:
        yield from self._message()
        item = self.output[-1]
        if not item["content"]:
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item["content"].append(part)
            yield self._part("added", dict(part))
        if text:
            item["content"][0]["text"] += text
            yield self._at("response.output_text.delta", delta=text, logprobs=[])

    def _refused(self, refusal: str) -> Iterator[dict[str, Any]]:
        yield from self._message()
        item = self.output[-1]
        if item["content"]:
            yield from self._text_done()
        item["content"].append({"type": "refusal", "refusal": ""})
        yield self._part("added", {"type": "refusal", "refusal": ""})
        item["content"][-1]["refusal"] = refusal
        yield self._at("response.refusal.delta", delta=refusal)
        yield self._at("response.refusal.done", refusal=refusal)
        yield self._part("done", dict(item["content"][-1]))

    def _message(self) -> Iterator[dict[str, Any]]:
        """Begin a message, unless the last item is one that has not ended."""
        if self._open:
            return
        item = {
            "id": f"msg_{secrets.token_hex(24)}",
            "type": "message",
            "role": "assistant",
            "status": "in_progress",
            "content": [],
        }
        self.output.append(item)
        self._open = True
        yield self._item("added", item | {"content": []})

    def _close(self) -> Iterator[dict[str, Any]]:
        """End the message that is open."""
        if not self._open:
            return
        item = self.output[-1]
        if item["content"] and item["content"][-1]["type"] == "output_text":
            yield from self._text_done()
        item["status"] = self.status if self.answer.reply.metadata.get("finish_reason") else "completed"
        self._open = False
        yield self._item("done", item)

    def _text_done(self) -> Iterator[dict[str, Any]]:
        part = self.output[-1]["content"][-1]
        yield self._at("response.output_text.done", text=part["text"], logprobs=[])
        yield self._part("done", dict(part))

    def _called(self, call_id: str, function: Mapping[str, str]) -> Iterator[dict[str, Any]]:
        yield from self._close()
        item = {
            "id": f"fc_{secrets.token_hex(24)}",
            "type": "function_call",
            "call_id": call_id,
            "name": function["name"],
            "arguments": function["arguments"],
            "status": "completed",
        }
        self.output.append(item)
        where = {"item_id": item["id"], "output_index": len(self.output) - 1}
        arguments = function["arguments"]
        yield self._item("added", item | {"arguments": "", "status": "in_progress"})
        yield self._event("response.function_call_arguments.delta", delta=arguments, **where)
        yield self._event("response.function_call_arguments.done", arguments=arguments, name=function["name"], **where)
        yield self._item("done", item)

    def _item(self, what: str, item: Mapping[str, Any]) -> dict[str, Any]:
        return self._event(f"response.output_item.{what}", output_index=len(self.output) - 1, item=dict(item))

    def _part(self, what: str, part: Mapping[str, Any]) -> dict[str, Any]:
        return self._at(f"response.content_part.{what}", part=part)

    def _at(self, kind: str, **more: Any) -> dict[str, Any]:
        """An event about the last part of the last item."""
        item, at = self.output[-1], len(self.output) - 1
        index = len(item["content"]) - 1
        return self._event(kind, item_id=item["id"], output_index=at, content_index=index, **more)

    def _event(self, kind: str, **more: Any) -> dict[str, Any]:
        number, self._events = self._events, self._events + 1
        return {"type": kind, "sequence_number": number, **more}


def _alone(found: Mapping[str, Any]) -> Any:
    """One result by itself: here they do not come in lists."""
    return found["results"][0] if found["type"] == "moderation_results" else found


def _described(tool: dict[str, Any]) -> dict[str, Any]:
    return tool | {"strict": bool(tool["strict"]), "parameters": tool["parameters"]}


def _usage(usage: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if usage is None:
        return None
    thought = usage.get("completion_tokens_details", {}).get("reasoning_tokens", 0)
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": thought},
        "total_tokens": usage["total_tokens"],
    }
