"""Tools in a chat template: turns as templates take them, and the form in which a template teaches calls."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tta_middleware.errors import ConfigurationError
from tta_middleware.tool_forms import TOOL_FORMS
from tta_middleware.types import Message, ToolCall, ToolFormat

_CAPABLE = "Qwen2.5-Instruct, Qwen3, Qwen3-Coder, Llama-3.1/3.2-Instruct, GLM-4.5, GPT-OSS or Mistral-7B-Instruct-v0.3"

# What templates call a turn's thoughts (DeepSeek, Qwen and most; Solar Open; GPT-OSS and LFM2.5; Apriel), and how they
# ask for it; or as a part of the content (Magistral, Ministral 3).
_THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought")
_READ = r"""(?:\.|\[['"]|get\(['"])\b{}\b"""
_IN_BLOCKS = re.compile(r"""\[['"]type['"]\]\s*==\s*['"]thinking['"]""")
# What templates say that take one call a turn (Llama 3, GPT-OSS).
_ONE_CALL = ("single tool-calls at once", "max 1 tool call per message")
_MISTRAL_ID = re.compile(r"[a-zA-Z0-9]{9}")


def tool_format(template: str) -> ToolFormat:
    """How models with this chat template write tool calls.

    Raises:
        ConfigurationError: the template takes no tools, or teaches a form that is not known.
    """
    if "tools" not in template:
        raise no_tools()
    for kind, form in TOOL_FORMS.items():
        if all(sign in template for sign in form.taught) and not any(sign in template for sign in form.foreign):
            return kind
    raise ConfigurationError(
        "the model's chat template takes tools, but teaches calls in a form that cannot be read here; "
        f"use a model such as {_CAPABLE}"
    )


def no_tools() -> ConfigurationError:
    """The error for a template that leaves tools out."""
    return ConfigurationError(
        f"the model's chat template takes no tools; use a model whose template does, such as {_CAPABLE}, "
        "or for structured output alone with_structured_output(..., method='json_schema')"
    )


def turn_forms(messages: Sequence[Message], template: str) -> list[list[dict[str, Any]]]:
    """The forms in which a chat template may take these turns, the usual one first.

    Many put a call's arguments behind a text (DeepSeek V3, Functionary). In the last form calls and results are words,
    for those that leave them out.
    """
    turns = as_turns(messages, template)
    if not any(turn.get("tool_calls") for turn in turns):
        return [turns]
    return [turns, _arguments_as_text(turns), _in_words(messages, template)]


def _arguments_as_text(turns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    changed = []
    for turn in turns:
        calls = [{**call, "function": _as_text(call["function"])} for call in turn.get("tool_calls", ())]
        changed.append({**turn, "tool_calls": calls} if calls else dict(turn))
    return changed


def _as_text(function: Mapping[str, Any]) -> dict[str, Any]:
    return {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False, default=str)}


def as_turns(messages: Sequence[Message], template: str) -> list[dict[str, Any]]:
    """Turns in the form that chat templates read; tool parts only where there are any.

    A template that knows no tools gets calls as words of the assistant, and results as turns of the user, who is the
    only one it can be told something by. Such a turn holds a ``tool_call_id``, which tells it from the user's own.
    """
    if "tool_calls" not in template:
        return _in_words(messages, template)
    if any(sign in template for sign in _ONE_CALL):
        messages = _one_call_a_turn(messages)
    if any(mark in template for mark in TOOL_FORMS["kimi_k2"].tokens):
        messages = _numbered(messages)
    short = "Tool call IDs" in template
    return [_turn(message, short_ids=short) | _thought(message, template) for message in messages]


def _thought(message: Message, template: str) -> dict[str, Any]:
    """What a turn thought, where the template wants to know; which turns it shows is its own affair."""
    if not message.reasoning or message.role != "assistant":
        return {}
    if _IN_BLOCKS.search(template):
        text = [{"type": "text", "text": message.content}] if message.content else []
        return {"content": [{"type": "thinking", "thinking": message.reasoning}, *text]}
    name = next((name for name in _THOUGHTS if re.search(_READ.format(name), template)), None)
    if name is None or (name == "thinking" and message.content and message.tool_calls):
        # GPT-OSS takes a thought beside a call in place of the text.
        return {}
    return {name: message.reasoning}


def is_asked(turn: Mapping[str, Any]) -> bool:
    """Whether a turn is the user's own, and not a result that a template without tools shows as one."""
    return turn["role"] == "user" and "tool_call_id" not in turn


def _in_words(messages: Sequence[Message], template: str) -> list[dict[str, Any]]:
    """Turns without any tool parts; where the template knows no tools at all, results are turns of the user."""
    results = "'tool'" not in template and '"tool"' not in template
    turns: list[dict[str, Any]] = []
    for message in messages:
        turn = {"role": message.role, "content": _said(message), **_thought(message, template)}
        if message.role == "tool" and results:
            turn = {"role": "user", "content": _told(message), "tool_call_id": message.tool_call_id or ""}
            if turns and turns[-1]["role"] == "user" and not is_asked(turns[-1]):
                turn["content"] = f"{turns.pop()['content']}\n{turn['content']}"
        turns.append(turn)
    return turns


def _said(message: Message) -> str:
    calls = [
        f"[called {call.name} with {json.dumps(dict(call.arguments), ensure_ascii=False, default=str)}]"
        for call in message.tool_calls
    ]
    return "\n".join([*([message.content] if message.content or not calls else []), *calls])


def _told(message: Message) -> str:
    return f"[{message.name or 'the tool'} returned: {message.content}]"


def _turn(message: Message, *, short_ids: bool) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = [_call(call, short_ids=short_ids) for call in message.tool_calls]
    if message.name is not None:
        turn["name"] = message.name
    if message.tool_call_id is not None:
        turn["tool_call_id"] = _call_id(message.tool_call_id, short=short_ids)
    return turn


def _call(call: ToolCall, *, short_ids: bool) -> dict[str, Any]:
    function = {"name": call.name, "arguments": dict(call.arguments)}
    return {"type": "function", "id": _call_id(call.id, short=short_ids), "function": function}


def _call_id(call_id: str, *, short: bool) -> str:
    """Mistral's templates refuse ids that are not nine letters and digits; other models' ids are."""
    if not short or _MISTRAL_ID.fullmatch(call_id):
        return call_id
    return hashlib.blake2b(call_id.encode(), digest_size=8).hexdigest()[:9]


def _numbered(messages: Sequence[Message]) -> list[Message]:
    """Ids that say the tool and the call's place: Kimi K2's template writes such of calls, and results need them."""
    ids: dict[str, str] = {}
    turns: list[Message] = []
    for message in messages:
        ids |= {call.id: f"functions.{call.name}:{index}" for index, call in enumerate(message.tool_calls)}
        calls = tuple(replace(call, id=ids[call.id]) for call in message.tool_calls)
        answered = message.tool_call_id
        turns.append(replace(message, tool_calls=calls, tool_call_id=ids.get(answered or "", answered)))
    return turns


def _one_call_a_turn(messages: Sequence[Message]) -> list[Message]:
    """Each of several calls in a turn of its own, its result after it: some templates take no other form."""
    turns: list[Message] = []
    moved: set[int] = set()
    for at, message in enumerate(messages):
        if at in moved:
            continue
        if len(message.tool_calls) < 2:
            turns.append(message)
            continue
        for index, call in enumerate(message.tool_calls):
            first = index == 0
            thought = message.reasoning if first else ""
            turns.append(Message("assistant", message.content if first else "", (call,), reasoning=thought))
            results = _results(messages, at, call)
            moved.update(results)
            turns += [messages[result] for result in results]
    return turns


def _results(messages: Sequence[Message], after: int, call: ToolCall) -> list[int]:
    found: list[int] = []
    for index in range(after + 1, len(messages)):
        if messages[index].role != "tool":
            break
        if messages[index].tool_call_id == call.id:
            found.append(index)
    return found
