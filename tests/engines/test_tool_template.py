"""Tools in chat templates, on SmolLM2's real tokenizer with templates of all known forms."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from tool_templates import TEMPLATES

from tta_middleware.chat_model.tool_parsing import ParsedCall, tool_parser
from tta_middleware.engines.prompt.control_tokens import silent_ids
from tta_middleware.engines.prompt.template import chat_template, render_prompt
from tta_middleware.engines.prompt.tool_template import as_turns, tool_format
from tta_middleware.errors import ConfigurationError
from tta_middleware.tool_forms import TOOL_MARKS
from tta_middleware.types import Message, ToolCall, ToolFormat

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALLS = (ToolCall("get_weather", {"city": "Zürich"}, "call_0123456789"), ToolCall("get_weather", {"city": "Bern"}, "b"))
TALK = [
    Message("user", "Where is it warmer?"),
    Message("assistant", "", CALLS),
    Message("tool", "21 degrees", name="get_weather", tool_call_id="call_0123456789"),
    Message("tool", "19 degrees", name="get_weather", tool_call_id="b"),
]


@pytest.fixture
def with_template(tokenizer: Any) -> Callable[[Any], Any]:
    def build(template: Any) -> Any:
        changed = copy.copy(tokenizer)  # its vocabulary, which is most of it, stays the same
        changed.chat_template = template
        return changed

    return build


def text(tokenizer: Any, messages: list[Message], tools: list[dict[str, Any]], prefix: str = "") -> str:
    return str(tokenizer.decode(render_prompt(tokenizer, messages, prefix, tools).token_ids))


@pytest.mark.parametrize("kind", TEMPLATES)
def test_tools_calls_and_results_reach_the_model(with_template: Callable[[str], Any], kind: ToolFormat) -> None:
    tokenizer = with_template(TEMPLATES[kind])
    assert tool_format(chat_template(tokenizer, tools=True)) == kind
    rendered = text(tokenizer, TALK, [WEATHER], "Well")
    for part in ("The weather in a city.", "Zürich", "Bern", "21 degrees", "19 degrees"):
        assert part in rendered
    assert rendered.endswith("Well")


@pytest.mark.parametrize("kind", [kind for kind in TEMPLATES if kind not in ("llama", "harmony")])
def test_a_call_is_read_as_the_template_shows_it(with_template: Callable[[str], Any], kind: ToolFormat) -> None:
    rendered = text(with_template(TEMPLATES[kind]), [TALK[0], Message("assistant", "", CALLS[:1])], [WEATHER])
    answer = rendered.rpartition("warmer?")[2]
    answer = answer.removesuffix("<|im_end|>\n<|im_start|>assistant\n")
    parser = tool_parser(kind, (), [WEATHER])
    pieces = [*parser.feed(answer), *parser.finish()]
    assert [piece for piece in pieces if not isinstance(piece, str)] == [ParsedCall("get_weather", {"city": "Zürich"})]


def test_a_call_stands_before_its_own_result_where_a_turn_takes_one_call(with_template: Callable[[str], Any]) -> None:
    rendered = text(with_template(TEMPLATES["llama"]), TALK, [WEATHER])
    order = [rendered.index(part) for part in ("Zürich", "21 degrees", "Bern", "19 degrees")]
    assert order == sorted(order)


def test_ids_name_the_call_where_the_template_names_it_so() -> None:
    turns = as_turns(TALK, TEMPLATES["kimi_k2"])
    ids = ["functions.get_weather:0", "functions.get_weather:1"]
    assert [call["id"] for call in turns[1]["tool_calls"]] == ids
    assert [turn["tool_call_id"] for turn in turns[2:]] == ids


def test_only_the_users_words_are_in_the_mask(with_template: Callable[[str], Any]) -> None:
    tokenizer = with_template(TEMPLATES["hermes"])
    rendered = render_prompt(tokenizer, TALK, "<tool_call>", [WEATHER])
    ids = [i for i, user in zip(rendered.token_ids, rendered.user_mask, strict=True) if user]
    assert tokenizer.decode(ids) == "Where is it warmer?"


def test_a_template_without_tools_says_what_to_use(tokenizer: Any, with_template: Callable[[str], Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"takes no tools; use a model .* Qwen2\.5.*json_schema"):
        render_prompt(tokenizer, TALK[:1], "", [WEATHER])
    mentions_them = with_template("{# no tools #}{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(ConfigurationError, match="takes no tools"):
        render_prompt(mentions_them, TALK[:1], "", [WEATHER])


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ messages }}", "takes no tools"),
        ("{{ tools }} <tool_call><function=name>", "form that cannot be read"),
        ("{{ tools }} <tool_call><invoke name=x>", "form that cannot be read"),
        ("{{ tools }} <|tool_calls_begin|>", "form that cannot be read"),
    ],
)
def test_forms_that_are_not_known_are_refused(template: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        tool_format(template)


def test_the_template_for_tools_is_taken_where_there_are_several(with_template: Callable[[Any], Any]) -> None:
    tokenizer = with_template({"default": "{{ messages[0].content }}", "tool_use": TEMPLATES["hermes"]})
    assert "get_weather" in text(tokenizer, TALK[:1], [WEATHER])
    assert text(tokenizer, TALK[:1], []) == "Where is it warmer?"


def test_a_mark_of_a_call_is_text_of_the_answer_and_other_special_tokens_are_not(tokenizer: Any) -> None:
    marked = copy.deepcopy(tokenizer)
    marked.add_special_tokens({"additional_special_tokens": [*sorted(TOOL_MARKS), "[CONTROL]"]})
    *marks, control = marked.convert_tokens_to_ids([*sorted(TOOL_MARKS), "[CONTROL]"])
    silent = silent_ids(marked)
    assert silent.isdisjoint(marks)
    assert {control, *tokenizer.all_special_ids} <= silent


GEMMA = """\
{%- for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Roles must alternate user/assistant!') }}{% endif -%}
{{ '<' + m.role + '>' + m.content + '\n' }}{% endfor %}{{ '<assistant>' }}"""


@pytest.mark.parametrize("template", [None, GEMMA])
def test_a_template_without_tools_is_told_of_them_in_words(
    tokenizer: Any, with_template: Callable[[Any], Any], template: str | None
) -> None:
    used = with_template(template) if template else tokenizer
    rendered = render_prompt(used, TALK)
    shown = used.decode(rendered.token_ids)
    parts = [
        'get_weather with {"city": "Zürich"}',
        'get_weather with {"city": "Bern"}',
        "get_weather returned: 21 degrees",
        "get_weather returned: 19 degrees",
    ]
    assert [part in shown for part in parts] == [True] * 4
    ids = [i for i, user in zip(rendered.token_ids, rendered.user_mask, strict=True) if user]
    assert used.decode(ids) == "Where is it warmer?"


def test_words_of_the_assistant_stay_beside_its_call(tokenizer: Any) -> None:
    talk = [TALK[0], Message("assistant", "Let me see.", CALLS[:1]), TALK[2], Message("user", "And now?")]
    shown = tokenizer.decode(render_prompt(tokenizer, talk).token_ids)
    assert 'assistant\nLet me see.\n[called get_weather with {"city": "Zürich"}]<|im_end|>' in shown
    assert "user\n[get_weather returned: 21 degrees]<|im_end|>" in shown
