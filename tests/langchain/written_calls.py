"""Calls as models of each form write them, and the tools that they call."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, get_args

from tta_middleware.chat_model.tool_parsing import ParsedCall
from tta_middleware.types import ToolFormat

KINDS: tuple[ToolFormat, ...] = get_args(ToolFormat)
TAGGED: tuple[ToolFormat, ...] = ("qwen3_coder", "seed_oss", "glm45", "minimax_m2")
"""Forms whose values are tagged text, typed by the tool's schema."""

ARGUMENTS: dict[str, Any] = {
    "s": {"type": "string"},
    "n": {"type": "integer"},
    "x": {"type": "number"},
    "b": {"type": "boolean"},
    "l": {"type": "array"},
    "o": {"$ref": "#/$defs/thing"},
    "m": {"anyOf": [{"type": "string"}, {"type": "null"}]},
}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {"type": "object", "properties": ARGUMENTS, "$defs": {"thing": {"type": "object"}}},
        },
    }
    for name in ("get_weather", "add")
]


def written(kind: ToolFormat, wanted: Sequence[ParsedCall]) -> str:
    """The calls as a model of that form writes them."""
    if kind in TAGGED:
        return _in_tags(kind, wanted)
    if kind in ("hermes", "llama", "mistral", "apriel"):
        return _as_objects(kind, wanted)
    return _headed(kind, wanted)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _as_objects(kind: ToolFormat, wanted: Sequence[ParsedCall]) -> str:
    key = "parameters" if kind == "llama" else "arguments"
    bodies = [_json({"name": call.name, key: call.arguments}) for call in wanted]
    if kind == "hermes":
        return "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)
    if kind == "apriel":
        return f"<tool_calls>[{', '.join(bodies)}]</tool_calls>"
    return "; ".join(bodies) if kind == "llama" else f"[TOOL_CALLS] [{', '.join(bodies)}]"


def _in_tags(kind: ToolFormat, wanted: Sequence[ParsedCall]) -> str:
    begin, value, end = {
        "qwen3_coder": (
            "<tool_call>\n<function={}>\n",
            "<parameter={}>\n{}\n</parameter>\n",
            "</function>\n</tool_call>",
        ),
        "seed_oss": (
            "<seed:tool_call>\n<function={}>\n",
            "<parameter={}>{}</parameter>\n",
            "</function>\n</seed:tool_call>",
        ),
        "glm45": ("<tool_call>{}\n", "<arg_key>{}</arg_key>\n<arg_value>{}</arg_value>\n", "</tool_call>"),
        "minimax_m2": ('<invoke name="{}">\n', '<parameter name="{}">{}</parameter>\n', "</invoke>\n"),
    }[kind]
    calls = [
        begin.format(call.name)
        + "".join(value.format(key, one if isinstance(one, str) else _json(one)) for key, one in call.arguments.items())
        + end
        for call in wanted
    ]
    if kind == "minimax_m2":
        return f"<minimax:tool_call>\n{''.join(calls)}</minimax:tool_call>"
    return "\n".join(calls)


def _headed(kind: ToolFormat, wanted: Sequence[ParsedCall]) -> str:
    shape, begin, end = {
        "mistral_v11": ("[TOOL_CALLS]{}[ARGS]{}", "", ""),
        "deepseek_v3": (
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>",
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁calls▁end｜>",
        ),
        "deepseek_v31": (
            "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜>",
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁calls▁end｜>",
        ),
        "kimi_k2": (
            "<|tool_call_begin|>functions.{}:0<|tool_call_argument_begin|>{}<|tool_call_end|>",
            "<|tool_calls_section_begin|>",
            "<|tool_calls_section_end|>",
        ),
        "gemma4": ("<|tool_call>call:{}{}<tool_call|>", "", ""),
        "harmony": ("<|channel|>commentary to=functions.{}<|message|>{}<|call|>", "", ""),
    }[kind]
    told = gemmas if kind == "gemma4" else _json
    return begin + "".join(shape.format(call.name, told(call.arguments)) for call in wanted) + end


def gemmas(value: Any) -> str:
    """A value as Gemma 4 writes it."""
    if isinstance(value, str):
        return f'<|"|>{value}<|"|>'
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{gemmas(item)}' for key, item in value.items())}}}"
    if isinstance(value, list):
        return f"[{','.join(map(gemmas, value))}]"
    return _json(value)
