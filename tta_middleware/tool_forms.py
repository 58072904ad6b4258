"""How models write tool calls: one table, which templates are known by and answers are read by. Pure.

The names are those of vLLM's parsers where it has one. Forms were taken from the families' own chat templates.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from tta_middleware.types import ToolFormat

_NAME = r"([^\s<>\[\]{}|\"]+)"
_KEY = r"([^<>\"\n]+)"


@dataclass(frozen=True, slots=True)
class ToolForm:
    """One form of calls.

    Attributes:
        taught: what a chat template holds that teaches the form.
        foreign: what it holds only if it teaches another one.
        open: the mark with which a stretch of calls begins.
        close: the mark with which it ends; empty where calls go on to the end of the answer.
        opening: what an answer begins with that is made to call, and what stands behind the tool's name there; where
            calls are JSON with a ``name``, what that stands behind, and the key of the arguments.
        head: pattern of what stands before a call's arguments, the name its group; empty where calls are JSON with a
            ``name``.
        call: pattern of a whole call whose arguments are tagged, its groups name and arguments.
        argument: pattern of one tagged argument, its groups key and value; empty where arguments are JSON.
        ends: pattern of the end of a stretch; empty for ``close`` outside a string.
        quote: what strings stand between, where it is not JSON's.
        around: marks around stretches, which say nothing.
        tokens: further marks that may be tokens of the vocabulary.
        spelled: whether the model writes the marks itself; otherwise whoever tells its channels apart does.
    """

    taught: tuple[str, ...]
    open: str
    close: str = ""
    opening: tuple[str, str] = ("", "")
    foreign: tuple[str, ...] = ()
    head: str = ""
    call: str = ""
    argument: str = ""
    ends: str = ""
    quote: str = ""
    around: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    spelled: bool = True

    @property
    def named(self) -> bool:
        """Whether a call's name stands outside of its arguments' JSON, or there is no JSON."""
        return bool(self.head or self.call)

    @property
    def marks(self) -> frozenset[str]:
        """All that may be a token of the vocabulary and is text of an answer."""
        return frozenset({self.open, *self.around, *self.tokens, *([self.close] if self.close else [])})


def _tagged(
    taught: tuple[str, ...],
    opening: tuple[str, str],
    marks: tuple[str, str],
    call: tuple[str, str],
    argument: tuple[str, str],
    *,
    line: str = "",
) -> ToolForm:
    """Calls whose arguments are tagged values, ``line`` what stands at both ends of a value."""
    (begin, end), (key, value_end) = call, argument
    return ToolForm(
        taught,
        *marks,
        opening,
        call=rf"\s*{begin}((?:.*?{value_end})??)\s*{end}\s*(?={begin}|\Z)",
        argument=rf"\s*{key}{line}(.*?){line}{value_end}\s*(?={key}|\Z)",
        ends=rf"(?:{value_end}|{begin})\s*{end}\s*{marks[1]}",
    )


_FUNCTION = (rf"<function={_NAME}>", "</function>")
_PARAMETER = (rf"<parameter={_KEY}>", "</parameter>")

_DEEPSEEK = ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>")
_DEEPSEEK_AROUND = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
_DEEPSEEK_BEGIN = f"{_DEEPSEEK_AROUND[0]}{_DEEPSEEK[0]}"

TOOL_FORMS: Mapping[ToolFormat, ToolForm] = {
    "mistral": ToolForm(
        ("[TOOL_CALLS]",),
        "[TOOL_CALLS]",
        opening=("[TOOL_CALLS] [{", "arguments"),
        foreign=("[ARGS]", "[CALL_ID]"),
    ),
    "mistral_v11": ToolForm(
        ("[TOOL_CALLS]", "[ARGS]"),
        "[TOOL_CALLS]",
        opening=("[TOOL_CALLS]", "[ARGS]"),
        head=rf"\s*(?:\[TOOL_CALLS\])?\s*{_NAME}(?:\[CALL_ID\]\w+)?\[ARGS\]",
        tokens=("[ARGS]", "[CALL_ID]"),
    ),
    "qwen3_coder": _tagged(
        ("<tool_call>", "<function=", "<parameter="),
        ("<tool_call>\n<function=", ">\n"),
        ("<tool_call>", "</tool_call>"),
        _FUNCTION,
        _PARAMETER,
        line=r"\n?",
    ),
    "seed_oss": _tagged(
        ("<seed:tool_call>", "<function=", "<parameter="),
        ("<seed:tool_call>\n<function=", ">\n"),
        ("<seed:tool_call>", "</seed:tool_call>"),
        _FUNCTION,
        _PARAMETER,
    ),
    "glm45": ToolForm(
        ("<tool_call>", "<arg_key>", "<arg_value>"),
        "<tool_call>",
        "</tool_call>",
        opening=("<tool_call>", "\n"),
        call=rf"\s*{_NAME}\s*((?:<arg_key>.*</arg_value>)?)\s*\Z",
        argument=rf"\s*<arg_key>{_KEY}</arg_key>\s*<arg_value>(.*?)</arg_value>\s*(?=<arg_key>|\Z)",
        ends=r"(?:</arg_value>\s*|\A[^<>]+)</tool_call>",
        tokens=("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    ),
    "minimax_m2": _tagged(
        ("<minimax:tool_call>", "<invoke name=", "<parameter name="),
        ('<minimax:tool_call>\n<invoke name="', '">\n'),
        ("<minimax:tool_call>", "</minimax:tool_call>"),
        (rf'<invoke name="{_NAME}">', "</invoke>"),
        (rf'<parameter name="{_KEY}">', "</parameter>"),
    ),
    "deepseek_v3": ToolForm(
        ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "```json"),
        *_DEEPSEEK,
        opening=(f"{_DEEPSEEK_BEGIN}function<｜tool▁sep｜>", "\n```json\n"),
        head=rf"\s*function<｜tool▁sep｜>{_NAME}\s*```json",
        around=_DEEPSEEK_AROUND,
        tokens=("<｜tool▁sep｜>",),
    ),
    "deepseek_v31": ToolForm(
        ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>"),
        *_DEEPSEEK,
        opening=(_DEEPSEEK_BEGIN, "<｜tool▁sep｜>"),
        head=rf"\s*{_NAME}<｜tool▁sep｜>",
        around=_DEEPSEEK_AROUND,
        tokens=("<｜tool▁sep｜>",),
    ),
    "kimi_k2": ToolForm(
        ("<|tool_call_begin|>", "<|tool_call_argument_begin|>"),
        "<|tool_call_begin|>",
        "<|tool_call_end|>",
        opening=("<|tool_calls_section_begin|><|tool_call_begin|>functions.", ":0<|tool_call_argument_begin|>"),
        head=r"\s*(?:functions\.)?([^\s<>|:]+)(?::\d+)?\s*<\|tool_call_argument_begin\|>",
        around=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        tokens=("<|tool_call_argument_begin|>",),
    ),
    "gemma4": ToolForm(
        ("<|tool_call>call:", "<tool_call|>"),
        "<|tool_call>",
        "<tool_call|>",
        opening=("<|tool_call>call:", "{"),
        head=rf"\s*call:{_NAME}",
        quote='<|"|>',
        tokens=('<|"|>',),
    ),
    "harmony": ToolForm(
        ("<|channel|>commentary", "functions.", "<|call|>"),
        "<|channel|>commentary to=functions.",
        "<|call|>",
        opening=("<|channel|>commentary to=functions.", "<|message|>"),
        head=rf"\s*(?:<\|channel\|>commentary to=functions\.)?{_NAME}(?:\s+\w+)?\s*<\|message\|>",
        spelled=False,
    ),
    "apriel": ToolForm(("<tool_calls>[",), "<tool_calls>", "</tool_calls>", opening=("<tool_calls>[{", "arguments")),
    "hermes": ToolForm(
        ("<tool_call>",),
        "<tool_call>",
        "</tool_call>",
        opening=("<tool_call>\n{", "arguments"),
        foreign=("<function=", "<arg_key>", "<|tool_call", "<invoke", "<tool_calls>"),
    ),
    "llama": ToolForm(
        ("<|start_header_id|>", '"parameters": '),
        "<|python_tag|>",
        opening=("{", "parameters"),
        foreign=("<|tool_call", "<tool_call>"),
    ),
}
"""By name, in the order in which a template is asked: what is more particular stands before what others hold, too."""

TOOL_MARKS = frozenset(mark for form in TOOL_FORMS.values() if form.spelled for mark in form.marks)
"""Tokens by which models mark a call: text of an answer, whatever the tokenizer says of them."""


def begun_mark(text: str, marks: Collection[str]) -> int:
    """Length of the longest end of a text that begins one of the marks: what must be held until more has come."""
    longest = min(max(map(len, marks), default=1) - 1, len(text))
    return next((size for size in range(longest, 0, -1) if any(mark.startswith(text[-size:]) for mark in marks)), 0)
