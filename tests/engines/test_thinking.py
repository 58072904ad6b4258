"""Thoughts in prompts and in what comes of them: chat templates that open a thought, marks that are tokens or text."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tta_middleware import Guard
from tta_middleware.config import Reasoning
from tta_middleware.engines.prompt.template import render_prompt
from tta_middleware.engines.prompt.vocabulary import Vocabulary
from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.errors import ConfigurationError
from tta_middleware.guard.events import Released
from tta_middleware.testing.scripted_moderator import ScriptedModerator
from tta_middleware.types import (
    AnswerState,
    Collected,
    GenerationRequest,
    Message,
    PromptEmbeddings,
    Sampling,
    Thought,
    ToolCall,
)

ASK = [Message("user", "How do bees find home?")]
TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content and loop.index0 > 1 %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
)
BEGIN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
OPENED = f"{TURNS}{BEGIN}{{% if add_generation_prompt %}}<think>\n{{% endif %}}"
SWITCHED = (
    f"{TURNS}{BEGIN}{{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}}"
    "<think>\n\n</think>\n\n{% endif %}"
)


@pytest.fixture(scope="session")
def tagged(tokenizer: Any) -> Any:
    """SmolLM2's tokenizer with the marks as tokens that are not special, as Qwen 3 has them."""
    made = copy.deepcopy(tokenizer)
    made.add_tokens(["<think>", "</think>"])
    return made


_made: dict[tuple[int, str], Any] = {}


def with_template(tokenizer: Any, template: str) -> Any:
    """A copy of one of the session's tokenizers, made once."""
    key = (id(tokenizer), template)
    if key not in _made:
        _made[key] = copy.copy(tokenizer)
        _made[key].chat_template = template
    return _made[key]


def shown(tokenizer: Any, *args: Any, **more: Any) -> tuple[str, AnswerState]:
    """What stands behind the last turn, and where the answer stands."""
    rendered = render_prompt(tokenizer, ASK, *args, **more)
    return tokenizer.decode(rendered.token_ids).rpartition("<|im_start|>assistant\n")[2], rendered.ends


@pytest.mark.parametrize("marked", [False, True], ids=["text", "tokens"])
@pytest.mark.parametrize(
    ("template", "thought", "prefix", "tail", "ends"),
    [
        (OPENED, None, "", "<think>\n", "open"),
        (OPENED, Thought(), "", "<think>\n\n</think>\n\n", "closed"),
        (OPENED, Thought("Bees see."), "", "<think>\nBees see.\n</think>\n\n", "closed"),
        (OPENED, Thought("Bees", closed=False), "", "<think>\nBees", "inside"),
        (OPENED, None, "They", "<think>\n\n</think>\n\nThey", "said"),
        (OPENED, Thought("Bees see."), "They", "<think>\nBees see.\n</think>\n\nThey", "said"),
        (SWITCHED, None, "", "", "before"),
        (SWITCHED, Thought(), "", "<think>\n\n</think>\n\n", "closed"),
        (SWITCHED, Thought("Bees", closed=False), "", "<think>\nBees", "inside"),
        (SWITCHED, Thought("Bees see."), "They", "<think>\nBees see.\n</think>\n\nThey", "said"),
    ],
)
def test_how_an_answer_begins(
    tokenizer: Any,
    tagged: Any,
    marked: bool,
    template: str,
    thought: Thought | None,
    prefix: str,
    tail: str,
    ends: AnswerState,
) -> None:
    used = with_template(tagged if marked else tokenizer, template)
    assert shown(used, prefix, thought=thought) == (tail, ends)


def test_a_model_without_marks_has_no_thoughts_to_begin_with(tokenizer: Any) -> None:
    plain = render_prompt(tokenizer, ASK, "They")
    assert render_prompt(tokenizer, ASK, "They", thought=Thought("Bees.")) == plain


def test_arguments_of_the_template(tokenizer: Any) -> None:
    used = with_template(tokenizer, SWITCHED)
    assert shown(used, arguments={"enable_thinking": False}) == ("<think>\n\n</think>\n\n", "closed")
    assert shown(used, arguments={"enable_thinking": True}) == ("", "before")
    for name in ("reasoning_effort", "messages", "add_generation_prompt"):
        with pytest.raises(ConfigurationError, match=name):
            render_prompt(used, ASK, arguments={name: 1})


def test_nobody_opens_a_thought_from_within_his_words(tagged: Any) -> None:
    used = with_template(tagged, f"{TURNS}{BEGIN}<think></think>")
    marks = {used.convert_tokens_to_ids(mark) for mark in ("<think>", "</think>")}
    rendered = render_prompt(used, [Message("user", "Say <think> and </think>.")], thought=Thought("No </think> yet."))
    found = [token_id for token_id in rendered.token_ids if token_id in marks]
    assert found == [used.convert_tokens_to_ids("<think>"), used.convert_tokens_to_ids("</think>")]


def test_earlier_thoughts_go_to_templates_that_ask_for_them(tokenizer: Any) -> None:
    talk = [
        Message("user", "Hi"),
        Message("assistant", "Yes?", reasoning="first"),
        Message("user", "And?"),
        Message("assistant", "Well.", reasoning="second"),
        *ASK,
    ]
    told = tokenizer.decode(render_prompt(with_template(tokenizer, OPENED), talk).token_ids)
    assert "<think>second</think>Well." in told
    assert "first" not in told
    plain = [Message(turn.role, turn.content) for turn in talk]
    assert render_prompt(tokenizer, talk) == render_prompt(tokenizer, plain)
    calling = [*plain, Message("assistant", "", (ToolCall("find", {}),), reasoning="third"), Message("tool", "42")]
    assert "third" in tokenizer.decode(render_prompt(with_template(tokenizer, OPENED), calling).token_ids)


def vocabulary(tokenizer: Any) -> Vocabulary:
    import torch

    return Vocabulary(tokenizer, torch.nn.Embedding(len(tokenizer), 4), frozenset({2}), None)


def decoded(used: Vocabulary, ids: list[int], ends: AnswerState = "before", stop: tuple[str, ...] = ()) -> Collected:
    from tta_middleware.engines.prompt.detokenise import deltas

    prompt = PromptEmbeddings(np.zeros((1, 4), np.float32), np.array([1]), np.array([False]), ends=ends)
    text, collected = used.assembler(prompt, stop), Collected()
    for token_id in ids:
        for delta in deltas(text.push(token_id), [token_id], None):
            collected.add(delta)
    for delta in deltas(text.flush(), [], "stop"):
        collected.add(delta)
    return collected


@pytest.mark.parametrize("marked", [False, True], ids=["text", "tokens"])
@pytest.mark.parametrize("opened", [False, True], ids=["own mark", "template's mark"])
def test_tokens_are_told_apart(tokenizer: Any, tagged: Any, marked: bool, opened: bool) -> None:
    used = vocabulary(with_template(tagged if marked else tokenizer, OPENED))
    text = f"{'' if opened else '<think>'}\nBees see 🐝 light.\n</think>\n\nThey fly home."
    ids = used.tokenizer(text, add_special_tokens=False)["input_ids"]
    found = decoded(used, ids, "open" if opened else "before")
    assert (found.reasoning, found.text) == ("Bees see 🐝 light.", "They fly home.")
    assert found.token_ids == ids
    assert used.tokenizer.decode(ids[found.lead :]).strip() == "They fly home."
    assert 0 < found.reasoning_tokens <= found.lead


def test_stop_strings_are_looked_for_in_the_answer_alone(tagged: Any) -> None:
    used = vocabulary(with_template(tagged, OPENED))
    ids = used.tokenizer("Bees stop.</think>They stop here.", add_special_tokens=False)["input_ids"]
    found = decoded(used, ids, "open", ("stop",))
    assert (found.reasoning, found.text) == ("Bees stop.", "They ")


def test_a_thought_is_closed_behind_the_tokens_that_it_has(tagged: Any) -> None:
    used = vocabulary(with_template(tagged, OPENED))
    rendered = render_prompt(used.tokenizer, ASK)
    prompt = PromptEmbeddings(
        used.rows(rendered.token_ids) + 1, np.array(rendered.token_ids), np.array(rendered.user_mask), ends="open"
    )
    ids = used.tokenizer("Bees see", add_special_tokens=False)["input_ids"]
    closed = used.closed_thought(prompt, ids)
    assert closed.ends == "closed"
    assert used.tokenizer.decode(closed.token_ids).endswith("<think>\nBees see\n</think>\n\n")
    assert np.array_equal(closed.matrix[: len(prompt.matrix)], prompt.matrix)
    assert np.array_equal(closed.matrix[len(prompt.matrix) :], used.rows(closed.token_ids[len(prompt.matrix) :]))


@pytest.fixture(scope="session")
def opened_model(save_model: Callable[[Any], Path], tiny_sizes: dict[str, Any]) -> str:
    """A random model whose chat template opens a thought."""
    from transformers import AutoTokenizer, LlamaConfig

    folder = str(save_model(LlamaConfig(**tiny_sizes)))
    used = with_template(AutoTokenizer.from_pretrained(folder), OPENED)
    used.save_pretrained(folder)
    return folder


@pytest.mark.slow
async def test_a_real_decoder_thinks_until_its_thought_is_closed(opened_model: str) -> None:
    engine = TransformersEngine(opened_model, dtype="float32")
    try:
        assert await engine.thinks()
        prompt = await engine.embed(ASK)
        [endless] = await engine.generate_batch([GenerationRequest(prompt, Sampling(max_new_tokens=12))])
        assert (endless.text, endless.finish_reason) == ("", "length")
        assert endless.reasoning
        closed = await engine.close_thought(prompt, endless.token_ids[:6])
        [answer] = await engine.generate_batch([GenerationRequest(closed, Sampling(max_new_tokens=12))])
        assert answer.text
        assert (answer.reasoning, answer.lead) == ("", 0)
        events = [event async for event in _watched(engine).stream(ASK, Sampling(max_new_tokens=18))]
    finally:
        await engine.aclose()
    pieces = [event for event in events if isinstance(event, Released)]
    thought = "".join(piece.text for piece in pieces if piece.channel == "reasoning")
    assert endless.reasoning.startswith(thought)
    assert "".join(piece.text for piece in pieces if piece.channel == "answer") == answer.text


def _watched(engine: TransformersEngine) -> Guard:
    """Shows thoughts, and closes them after six tokens."""
    return Guard(engine, ScriptedModerator(), reasoning=Reasoning(mode="show", max_tokens=6))
