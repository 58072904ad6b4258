"""Counts of conversations, and of the parts that a template takes only as a whole."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tta_middleware.engines.prompt.counting import count_prompt, token_ids
from tta_middleware.engines.prompt.template import render_prompt
from tta_middleware.errors import ConfigurationError
from tta_middleware.types import Message, ToolCall

STRICT = """\
{%- for m in messages %}{% if m.role == 'system' or (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Roles must alternate user/assistant!') }}{% endif -%}
{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}{{ '<|im_start|>assistant\n' }}"""
TALK = [
    Message("user", "Where is it warmer?"),
    Message("assistant", "Let me see.", (ToolCall("get_weather", {"city": "Bern"}, "1"),)),
    Message("tool", "19 degrees", name="get_weather", tool_call_id="1"),
    Message("assistant", "In Bern."),
]


@pytest.fixture(scope="module")
def strict(tokenizer: Any) -> Any:
    changed = copy.copy(tokenizer)
    changed.chat_template = STRICT
    return changed


def test_a_conversation_counts_as_it_is_rendered(strict: Any) -> None:
    assert count_prompt(strict, TALK) == len(render_prompt(strict, TALK).token_ids)


@pytest.mark.parametrize("begin", range(len(TALK)))
@pytest.mark.parametrize("end", range(len(TALK) + 1))
def test_every_part_is_counted_and_none_counts_as_less_than_its_words(strict: Any, begin: int, end: int) -> None:
    part = TALK[begin:end]
    assert count_prompt(strict, part) >= sum(len(token_ids(strict, turn.content)) for turn in part)


def test_a_model_without_a_chat_template_says_so(strict: Any) -> None:
    strict = copy.copy(strict)
    strict.chat_template = None
    with pytest.raises(ConfigurationError, match="no chat template"):
        count_prompt(strict, TALK)
