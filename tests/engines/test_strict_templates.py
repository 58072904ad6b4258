"""Chat templates that refuse a system turn and two user turns in a row, as Gemma 2's does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tta_middleware import Budget, Guard, Message, Race, Repair, Sampling
from tta_middleware.engines.prompt.template import render_prompt
from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.errors import ConfigurationError
from tta_middleware.guard import reminded
from tta_middleware.methods.race import RESPONSIBLE
from tta_middleware.testing.scripted_moderator import ScriptedModerator

GEMMA_2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}"
    "{{ '<|im_start|>' + role + '\n' + message['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
"""Gemma 2's own but for its control tokens, which are SmolLM2's."""

ASK = "Tell me about the old harbour town."


@pytest.fixture(scope="module")
def strict(tokenizer: Any) -> Any:
    changed = copy.copy(tokenizer)
    changed.chat_template = GEMMA_2
    return changed


@pytest.fixture
def engine(save_model: Callable[[Any], Path], tiny_sizes: dict[str, Any], strict: Any) -> TransformersEngine:
    from transformers import Gemma2Config

    folder = save_model(Gemma2Config(**tiny_sizes, sliding_window=64))
    strict.save_pretrained(str(folder))
    return TransformersEngine(str(folder), dtype="float32")


def shown(tokenizer: Any, turns: list[Message]) -> tuple[str, str]:
    """What the model sees, and which of it is the user's last turn."""
    rendered = render_prompt(tokenizer, turns)
    user = [i for i, marked in zip(rendered.token_ids, rendered.user_mask, strict=True) if marked]
    return tokenizer.decode(rendered.token_ids), tokenizer.decode(user)


def test_a_system_turn_becomes_the_beginning_of_the_users(strict: Any) -> None:
    text, user = shown(strict, reminded([Message("user", ASK)], RESPONSIBLE))
    assert f"user\n{RESPONSIBLE}\n\n{ASK}" in text
    assert user.strip() == ASK


def test_user_turns_that_follow_one_another_become_one(strict: Any) -> None:
    text, user = shown(strict, [Message("user", "I like towns."), Message("user", ASK)])
    assert f"user\nI like towns.\n\n{ASK}" in text
    assert user.strip() == ASK


def test_turns_that_the_template_takes_stay_as_they_are(tokenizer: Any) -> None:
    text, _ = shown(tokenizer, [Message("system", "Be brief."), Message("user", "Hi"), Message("user", ASK)])
    assert "system\nBe brief.<|im_end|>" in text
    assert "user\nHi<|im_end|>" in text


def test_what_no_folding_mends_is_refused_by_its_own_roles(strict: Any) -> None:
    turns = [Message("user", "Hi"), Message("assistant", "Hello."), Message("assistant", "You?"), Message("user", ASK)]
    with pytest.raises(ConfigurationError, match=r"user, assistant, assistant, user: .*alternate"):
        render_prompt(strict, turns)


@pytest.mark.parametrize("release", ["window", "end"])
async def test_the_default_method_repairs_on_such_a_model(engine: TransformersEngine, release: Any) -> None:
    """Every rung is tried: the moderator flags everything but what the last one says."""
    seen: list[str] = []

    def score(text: str) -> dict[str, float]:
        seen.append(text)
        return {"illicit": 0.9}

    budget = Budget(generations=1 + len(Race().ladder))
    guard = Guard(engine, ScriptedModerator(score=score), repair=Repair(method=Race(), budget=budget))
    *_, last = [
        event async for event in guard.stream([Message("user", ASK)], Sampling(max_new_tokens=8), release=release)
    ]
    assert (last.answer.trace.outcome, last.answer.trace.stop_reason) == ("blocked", "budget: generations")  # type: ignore[union-attr]
    assert last.answer.trace.generations == budget.generations  # type: ignore[union-attr]
    await engine.aclose()
