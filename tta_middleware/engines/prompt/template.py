"""Conversation to tokens: the chat template, and which tokens are the user's words."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tta_middleware.call_text import whole
from tta_middleware.engines.prompt.control_tokens import ControlTokens, Span, Veil, spelled_in, thought_marks
from tta_middleware.engines.prompt.thoughts import ThoughtMarks
from tta_middleware.engines.prompt.tool_template import is_asked, no_tools, turn_forms
from tta_middleware.errors import ConfigurationError, EmptyPromptError
from tta_middleware.tool_forms import ToolForm
from tta_middleware.types import AnswerState, Message, Thought

_NOT_ARGUMENTS = frozenset({"messages", "tools", "add_generation_prompt", "continue_final_message", "tokenize"})
"""What a chat template is told in any case, or what is no argument of one."""

_SWITCHES = ("enable_thinking", "thinking")
"""Arguments by which chat templates let a model answer at once: Qwen 3, GLM, Gemma 4; DeepSeek V3.1, Granite 3."""

_RAISED = (TypeError, ValueError, AttributeError, LookupError)
"""What a chat template raises by itself where a turn is not as it takes them."""


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """Token ids of a prompt, for each whether it is content of the last user turn, and where in an answer it ends."""

    token_ids: list[int]
    user_mask: list[bool]
    ends: AnswerState = "before"


def render_prompt(
    tokenizer: Any,
    messages: Sequence[Message],
    assistant_prefix: str = "",
    tools: Sequence[Mapping[str, Any]] = (),
    thought: Thought | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> RenderedPrompt:
    """Tokenise a conversation with the generation prompt appended.

    The rendering is tokenised once and whole, and only the template's own control tokens become such; content that
    spells one is tokenised as text there. A token belongs to the user only if all its characters do, so tokens that
    straddle template and content stay out of the mask. Turns that the template refuses (Gemma 2 knows no system role,
    many take no two user turns in a row) are folded, see :func:`folded`. A model that thinks has done so before an
    ``assistant_prefix``: with ``thought``, or else without one.

    Raises:
        EmptyPromptError: the last user turn is empty or there is none.
        ConfigurationError: the tokenizer has no chat template, refuses the roles, takes no tools, or is not a fast one;
            or its template does not read one of ``arguments``.
    """
    last_user_turn(messages)
    template = chat_template(tokenizer, tools=bool(tools))
    told = template_arguments(template, arguments or {})
    marks = thought_marks(tokenizer)
    if marks is not None and assistant_prefix and thought is None:
        thought = Thought()
    if thought == Thought():
        told = {**{name: False for name in _SWITCHES if reads(template, name)}, **told}
    control = ControlTokens(tokenizer, template)
    assistant_prefix = whole(assistant_prefix)
    renderings = [
        _Rendering(tokenizer, control, _whole(turns), _whole(list(tools)), told)
        for turns in turn_forms(messages, template)
    ]
    rendering, (text, spelled, (start, end)) = _first_that_shows_all(renderings)
    tokens = control.encode(tokenizer, text, spelled)
    mask = [start <= first < last <= end for _, (first, last) in tokens]
    ends = marks.ending(rendering.tail()) if marks is not None else "before"
    added: list[int] = []
    before = assistant_prefix
    if marks is not None and thought is not None:
        parts, ends = lead_of(marks, ends, thought)
        if marks.calls is not None and assistant_prefix:
            parts, before = _with_messages(marks, marks.calls, parts, assistant_prefix), ""
        added = encode_lead(tokenizer, parts, control)
    prefix = control.encode(tokenizer, before, spelled_in(control.special, before))
    ids = [*(token_id for token_id, _ in tokens), *added, *(token_id for token_id, _ in prefix)]
    return RenderedPrompt(ids, [*mask, *(False for _ in ids[len(mask) :])], "said" if assistant_prefix else ends)


def lead_of(marks: ThoughtMarks, ends: AnswerState, thought: Thought) -> tuple[list[tuple[str, bool]], AnswerState]:
    """What an answer that stands where ``ends`` says is begun with so that it has thought: pieces, and where it stands.

    A piece is a text and whether the marks in it are ones. A template that has closed the thought is not gone behind.
    """
    if ends in ("closed", "said"):
        return [], ends
    if not thought.text and thought.closed:
        return [(marks.skipping if ends == "before" else marks.closing, True)], "closed"
    begun = [(marks.opening, True)] if ends == "before" else []
    parts = [*begun, (thought.text, False), (marks.closing if thought.closed else "", True)]
    after: AnswerState = "closed" if thought.closed else "inside" if thought.text else "open"
    return parts, after


def _with_messages(
    marks: ThoughtMarks, calls: ToolForm, lead: Sequence[tuple[str, bool]], prefix: str
) -> list[tuple[str, bool]]:
    """What an answer is begun with where calls are messages of their own: their headers are marks again.

    Words that stand in no call are a message to the user, and get the header of one.
    """
    begin, behind = calls.opening
    header = rf"{re.escape(begin)}[^\s<>]*(?:{re.escape(behind)})?"
    end, start = marks.parting
    *pieces, (last, _) = lead or [("", True)]
    pieces.append((last.removesuffix(marks.skipping), True))
    parting, inside = "", False
    for part in re.split(rf"\s*({header})|({re.escape(calls.close)})", prefix):
        if not part or not (inside or part.strip()):
            continue
        if part == calls.close:
            pieces.append((part, True))
            parting, inside = start, False
            continue
        if part.startswith(begin):
            pieces.append((parting + part, True))
        elif inside:
            pieces.append((part, False))
        else:
            pieces += [(parting + marks.skipping, True), (part.lstrip() if parting else part, False)]
        parting, inside = end + start, True
    return pieces


def encode_lead(tokenizer: Any, parts: Sequence[tuple[str, bool]], control: ControlTokens | None = None) -> list[int]:
    """The tokens of such pieces; what a thought spells stays text."""
    control = control or ControlTokens(tokenizer, chat_template(tokenizer))
    found = []
    for text, marked in parts:
        spelled = [] if marked else spelled_in(control.all, text)
        found += [token_id for token_id, _ in control.encode(tokenizer, text, spelled)] if text else []
    return found


def template_arguments(template: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for a chat template.

    Raises:
        ConfigurationError: the template does not read one of them, or gets it in any case.
    """
    for name in arguments:
        if name in _NOT_ARGUMENTS or not reads(template, name):
            raise ConfigurationError(
                f"the model's chat template does not read {name!r}; leave it out of the template's arguments"
            )
    return dict(arguments)


def reads(template: str, name: str) -> bool:
    """Whether a chat template looks at an argument of that name; a word of its text is none."""
    return name in _variables(template)


@lru_cache(maxsize=16)
def _variables(template: str) -> frozenset[str]:
    """Names that a chat template looks up and does not set in every case."""
    import jinja2
    from jinja2 import meta

    # The tag is transformers' own, and says which text is the assistant's.
    plain = re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", template)
    try:
        # Read, never rendered, so there is nothing to escape.
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)  # noqa: S701
    except jinja2.TemplateSyntaxError:
        # What is wrong with it shows as soon as it is used.
        return frozenset(re.findall(r"\w+", template))
    return frozenset(meta.find_undeclared_variables(tree))


def _whole(value: Any) -> Any:
    """The same JSON-like value; halves of surrogate pairs, which no tokenizer takes, are replaced in its strings."""
    if isinstance(value, Mapping):
        return {_whole(key): _whole(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_whole(item) for item in value]
    return whole(value) if isinstance(value, str) else value


def _in_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def last_user_turn(messages: Sequence[Message]) -> int:
    """Index of the last user message.

    Raises:
        EmptyPromptError: it is empty, or there is none.
    """
    for index in range(len(messages) - 1, -1, -1):
        if messages[index].role == "user":
            if messages[index].content.strip():
                return index
            raise EmptyPromptError("the last user message is empty; give the model something to answer")
    raise EmptyPromptError("the conversation has no user message; add one")


def chat_template(tokenizer: Any, *, tools: bool = False) -> str:
    """The text of the tokenizer's chat template, of the one for tools if there are several.

    Raises:
        ConfigurationError: it has none, or reports no character offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigurationError("the model's tokenizer reports no character offsets; use one with tokenizer.json")
    if not tokenizer.chat_template:
        raise ConfigurationError("the model has no chat template; use an instruction-tuned model")
    return str(tokenizer.get_chat_template(tools=[{}] if tools else None))


def folded(turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """System turns as user turns, and user turns that follow one another as one, with an empty line between."""
    merged: list[dict[str, Any]] = []
    for turn in turns:
        if turn["role"] not in ("system", "user"):
            merged.append(turn)
        elif merged and merged[-1]["role"] == "user":
            merged[-1] = {**merged[-1], "content": f"{merged[-1]['content']}\n\n{turn['content']}"}
        else:
            merged.append({**turn, "role": "user"})
    return merged


def _first_that_shows_all(renderings: Sequence[_Rendering]) -> tuple[_Rendering, tuple[str, list[Span], Span]]:
    """The first that the template takes and in which all calls and results are there; the last one in any case.

    Raises:
        ConfigurationError: the template takes none of them.
    """
    refused: ConfigurationError | None = None
    for at, rendering in enumerate(renderings):
        try:
            if at == len(renderings) - 1 or rendering.shows_all():
                return rendering, rendering.run()
        except ConfigurationError as exc:
            refused = refused or exc
    raise refused or ConfigurationError("the model's chat template leaves tool calls out")


class _Rendering:
    """One conversation on its way through the template, what it spells hidden."""

    def __init__(
        self,
        tokenizer: Any,
        control: ControlTokens,
        turns: list[dict[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        arguments: Mapping[str, Any],
    ) -> None:
        self._tokenizer = tokenizer
        self._veil = Veil(control, json.dumps([turns, list(tools), dict(arguments)], ensure_ascii=False, default=str))
        self._arguments: dict[str, Any] = self._veil.hide(dict(arguments))
        self._tools = [self._veil.hide(dict(tool)) for tool in tools]
        self._turns = [self._hidden(turn) for turn in turns]
        self._in_parts = False

    def run(self) -> tuple[str, list[Span], Span]:
        """The text, what content spells in it, and where the last user turn's words are.

        Templates of models that see images as well (Llama Guard 3 1B and 4) may read content in parts alone.
        """
        try:
            return self._run()
        except ConfigurationError as plain:
            self._in_parts = True
            try:
                return self._run()
            except ConfigurationError:
                # A template that takes texts trips over parts in ways of its own; what is wrong was said before.
                raise plain from None

    def shows_all(self) -> bool:
        """Whether every call and every result reaches the model; templates leave out what they do not expect."""
        mark = f"{self._veil.placeholder}shown"
        calls = results = 0
        turns = []
        for turn in self._turns:
            changed = dict(turn)
            if turn.get("tool_calls"):
                calls += len(turn["tool_calls"])
                changed["tool_calls"] = [
                    {**call, "function": {**call["function"], "name": f"{mark}call"}} for call in turn["tool_calls"]
                ]
            if turn["role"] == "tool":
                results += 1
                changed["content"] = f"{mark}result"
            turns.append(changed)
        text = self._render(turns, self._tools)
        return text.count(f"{mark}call") >= calls and text.count(f"{mark}result") >= results

    def _run(self) -> tuple[str, list[Span], Span]:
        rendered = self._render(self._turns, self._tools)
        if self._tools and rendered == self._render(self._turns, []):
            raise no_tools()
        text, spelled = self._veil.lift(rendered)
        return text, spelled, self._content_span(text)

    def tail(self) -> str:
        """What the template begins the answer with."""
        whole = self._render(self._turns, self._tools)
        bare = self._render(self._turns, self._tools, begun=False)
        if whole == bare:
            return self._behind_the_last_turn()
        shared = next((at for at, pair in enumerate(zip(whole, bare, strict=False)) if pair[0] != pair[1]), len(bare))
        return whole[shared:]

    def _behind_the_last_turn(self) -> str:
        """What a template ends with that begins the answer unasked (Command R7B's closed thought)."""
        changed = [*self._turns[:-1], {**self._turns[-1], "content": self._veil.placeholder}]
        return self._veil.lift(self._render(changed, self._tools).rpartition(self._veil.placeholder)[2])[0]

    def _hidden(self, turn: dict[str, Any]) -> dict[str, Any]:
        hidden: dict[str, Any] = self._veil.hide(turn)
        if turn["role"] == "assistant":
            # Templates read marks such as </think> in the model's own text; nothing can be forged by them there.
            hidden["content"] = self._veil.hide(turn["content"], special_only=True)
        return hidden

    def _render(self, turns: list[dict[str, Any]], tools: list[dict[str, Any]], *, begun: bool = True) -> str:
        import jinja2

        try:
            return self._apply(turns, tools, begun)
        except jinja2.TemplateSyntaxError as exc:
            raise ConfigurationError(
                f"the model's chat template is broken: {exc}; take it from where it works"
            ) from exc
        except (jinja2.TemplateError, *_RAISED) as exc:
            refused = exc
        try:
            return self._apply(folded(turns), tools, begun)
        except (jinja2.TemplateError, *_RAISED):
            roles = ", ".join(turn["role"] for turn in turns)
            raise ConfigurationError(f"the model's chat template refuses the roles {roles}: {refused}") from refused

    def _apply(self, turns: list[dict[str, Any]], tools: list[dict[str, Any]], begun: bool) -> str:
        template = self._tokenizer.apply_chat_template
        told = {"tokenize": False, "add_generation_prompt": begun, **self._arguments}
        if self._in_parts:
            turns = [{**turn, "content": _in_parts(turn["content"])} for turn in turns]
        return str(template(turns, tools=tools or None, **told))

    def _content_span(self, text: str) -> Span:
        """Where the last user turn's words are in ``text``; found by rendering with a placeholder in their place.

        Searching for the words themselves could hit another turn or the template ('user', 'im_end').
        """
        at = max(index for index, turn in enumerate(self._turns) if is_asked(turn))
        replaced = [*self._turns]
        replaced[at] = {**replaced[at], "content": self._veil.placeholder}
        before, _, after = self._render(replaced, self._tools).partition(self._veil.placeholder)
        before, after = self._veil.lift(before)[0], self._veil.lift(after)[0]
        end = len(text) - len(after)
        if text[: len(before)] != before or text[end:] != after or end <= len(before):
            raise ConfigurationError("the model's chat template rewrites the user's text, so it cannot be located")
        return len(before), end
