"""Which tokens of a rendered conversation are the user's words."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tta_middleware.engines.template import render_prompt
from tta_middleware.errors import ConfigurationError, EmptyPromptError
from tta_middleware.types import Message


def user_text(tokenizer: Any, messages: list[Message], prefix: str = "") -> str:
    rendered = render_prompt(tokenizer, messages, prefix)
    ids = [i for i, user in zip(rendered.token_ids, rendered.user_mask, strict=True) if user]
    return str(tokenizer.decode(ids))


@given(
    content=st.text(st.characters(max_codepoint=0x1FFFF, exclude_categories=["Cs", "Co", "Cc"]), min_size=1).filter(
        str.strip
    )
)
@example(content="user")
@example(content="im_end")
@example(content="You are a helpful AI assistant")
@example(content="  two  spaces  ")
@settings(max_examples=80, deadline=None)
def test_the_mask_holds_nothing_but_the_users_words(tokenizer: Any, content: str) -> None:
    found = user_text(tokenizer, [Message("user", content)])
    # Only what shares a token with the template may be missing.
    assert found in content
    assert content.strip() in found or len(found) >= len(content.strip()) - 2


def test_the_last_of_two_equal_turns_is_masked(tokenizer: Any) -> None:
    turns = [Message("user", "again"), Message("assistant", "again"), Message("user", "again")]
    rendered = render_prompt(tokenizer, turns)
    assert user_text(tokenizer, turns) == "again"
    ids = [at for at, token_id in enumerate(rendered.token_ids) if rendered.user_mask[at]]
    assert min(ids) > len(rendered.token_ids) // 2


def test_turns_after_the_user_and_the_prefix_stay_out(tokenizer: Any) -> None:
    turns = [Message("user", "first"), Message("assistant", "called a tool"), Message("tool", "42")]
    assert user_text(tokenizer, turns, prefix="So, first") == "first"


def test_the_models_own_system_prompt_is_kept(tokenizer: Any) -> None:
    text = tokenizer.decode(render_prompt(tokenizer, [Message("user", "Hi")]).token_ids)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>assistant\n")


def test_a_template_that_strips_its_content_is_followed(tokenizer: Any) -> None:
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}[/]{% endfor %}"
    assert user_text(strict, [Message("user", "  Hi there \n")]).strip() == "Hi there"


def test_templates_that_cannot_be_used_say_why(tokenizer: Any) -> None:
    odd = copy.deepcopy(tokenizer)
    turns = [Message("system", "Be brief."), Message("user", "Hi there")]
    for template, told in (
        (None, "no chat template"),
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "rewrites the user's text"),
    ):
        odd.chat_template = template
        with pytest.raises(ConfigurationError, match=told):
            render_prompt(odd, turns)


@pytest.mark.parametrize("turns", [[], [Message("assistant", "Hi")], [Message("user", "x"), Message("user", " ")]])
def test_a_conversation_without_a_question_is_refused(tokenizer: Any, turns: list[Message]) -> None:
    with pytest.raises(EmptyPromptError):
        render_prompt(tokenizer, turns)
