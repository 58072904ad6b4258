"""Chat templates that ask for turns, thoughts and arguments in ways of their own, as real ones do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tta_middleware.engines.prompt.template import render_prompt
from tta_middleware.engines.prompt.thoughts import ThoughtSplitter, find_marks
from tta_middleware.errors import ConfigurationError
from tta_middleware.types import AnswerState, Message, Thought, ToolCall

ASK = [Message("user", "How do bees find home?")]
TURNS = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
BEGIN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


@pytest.fixture(scope="module")
def with_template(tokenizer: Any) -> Callable[..., Any]:
    """Puts a template into the module's one copy of a tokenizer, for a copy takes a while, or into one with tokens."""
    shared = copy.deepcopy(tokenizer)

    def build(template: str, *tokens: str) -> Any:
        changed = copy.deepcopy(shared) if tokens else shared
        changed.add_tokens(list(tokens))
        changed.chat_template = template
        return changed

    return build


def text(tokenizer: Any, messages: list[Message], **more: Any) -> str:
    return str(tokenizer.decode(render_prompt(tokenizer, messages, **more).token_ids))


def test_a_thought_that_is_closed_without_being_asked_for_is_seen(with_template: Callable[..., Any]) -> None:
    """Command R7B begins the answer whether or not a generation prompt is wanted."""
    used = with_template(f"{TURNS}{{{{ '<|im_start|>assistant\n<think></think>' }}}}")
    assert render_prompt(used, ASK).ends == "closed"
    assert text(used, ASK, thought=Thought()).endswith("assistant\n<think></think>")


@pytest.mark.parametrize("switch", ["enable_thinking", "thinking"])
def test_an_answer_at_once_is_asked_for_as_the_template_takes_it(
    with_template: Callable[..., Any], switch: str
) -> None:
    used = with_template(
        f"{TURNS}{BEGIN}{{% if {switch} is defined and not {switch} %}}</think>{{% else %}}<think>{{% endif %}}"
    )
    assert text(used, ASK, thought=Thought()).endswith("assistant\n</think>")
    assert text(used, ASK, arguments={switch: True}).endswith("assistant\n<think>")


def test_a_word_of_the_template_is_no_argument_of_it(with_template: Callable[..., Any]) -> None:
    used = with_template(
        "{% generation %}{% endgeneration %}{{ 'Mind your style and thinking.' }}{% for m in messages %}"
        f"{{% if m.thinking %}}{{{{ m.thinking }}}}{{% endif %}}{{% if m.role == 'x' %}}{{% break %}}{{% endif %}}"
        f"{{% endfor %}}{{% set depth = depth or 'low' %}}{{{{ depth }}}}{TURNS}{BEGIN}"
    )
    assert "high" in text(used, ASK, arguments={"depth": "high"})
    for name in ("style", "thinking", "role"):
        with pytest.raises(ConfigurationError, match=f"does not read '{name}'"):
            render_prompt(used, ASK, arguments={name: "x"})


def test_a_template_that_fails_in_its_own_way_is_refused(with_template: Callable[..., Any]) -> None:
    """As those do that are for conversations with tools alone."""
    used = with_template(f"{{% for t in tools %}}{{{{ t }}}}{{% endfor %}}{TURNS}{BEGIN}")
    with pytest.raises(ConfigurationError, match=r"refuses the roles user: .*not iterable"):
        render_prompt(used, ASK)


CALLED = [*ASK, Message("assistant", "", (ToolCall("find", {"at": "hive"}),)), Message("tool", "North")]
CALL = "{% for c in m.tool_calls %}{{ '<call>' + c.function.name + ' ' + ARGUMENTS + '</call>' }}{% endfor %}"
REST = "{% elif m.content %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endif %}{% endfor %}"


@pytest.mark.parametrize("arguments", ["c.function.arguments | tojson", "c.function.arguments"], ids=["json", "text"])
def test_arguments_of_a_call_are_a_text_where_the_template_takes_one(
    with_template: Callable[..., Any], arguments: str
) -> None:
    call = CALL.replace("ARGUMENTS", f"({arguments})")
    used = with_template(f"{{% for m in messages %}}{{% if m.tool_calls %}}{call}{REST}{BEGIN}")
    found = text(used, CALLED)
    assert '<call>find {"at": "hive"}</call>' in found
    assert "tool\nNorth" in found


def test_a_call_is_told_in_words_where_the_template_shows_none(with_template: Callable[..., Any]) -> None:
    """DeepSeek R1's leaves a call out where its turn has any content."""
    used = with_template(f"{{# tool_calls, 'tool' #}}{TURNS}{BEGIN}")
    found = text(used, CALLED)
    assert '[called find with {"at": "hive"}]' in found
    assert "North" in found


@pytest.mark.parametrize(
    "shown",
    [
        "{% if m.reasoning %}{{ '<think>' + m.reasoning + '</think>' }}{% endif %}",
        "{% if m['thought'] %}{{ '<think>' + m['thought'] + '</think>' }}{% endif %}",
        "{% if m.get('reasoning_content') %}{{ '<think>' + m.get('reasoning_content') + '</think>' }}{% endif %}",
        "{% if m.thinking %}{{ '<think>' + m.thinking + '</think>' }}{% endif %}",
    ],
)
def test_thoughts_are_handed_on_by_the_name_that_the_template_asks_for(
    with_template: Callable[..., Any], shown: str
) -> None:
    used = with_template(TURNS.replace("{% for m in messages %}", f"{{% for m in messages %}}{shown}") + BEGIN)
    talk = [Message("user", "Hi"), Message("assistant", "Yes?", reasoning="A guest."), *ASK]
    assert "<think>A guest.</think>" in text(used, talk)
    assert "A guest." not in text(with_template(f"{TURNS}{BEGIN}"), talk)


def test_thoughts_are_parts_of_the_content_where_the_template_takes_them_so(with_template: Callable[..., Any]) -> None:
    """Magistral and Ministral 3."""
    blocks = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.content is string %}{{ m.content }}"
        "{% else %}{% for block in m.content %}{% if block['type'] == 'thinking' %}"
        "{{ '[THINK]' + block['thinking'] + '[/THINK]' }}{% else %}{{ block['text'] }}{% endif %}{% endfor %}"
        "{% endif %}{% endfor %}"
    )
    talk = [Message("user", "Hi"), Message("assistant", "Yes?", reasoning="A guest."), *ASK]
    assert "[THINK]A guest.[/THINK]Yes?" in text(with_template(f"{blocks}{BEGIN}"), talk)


SPELLED = [
    (["<mm:think>", "</mm:think>"], "", "<mm:think>"),
    (["<think:opensource>", "</think:opensource>"], "", "<think:opensource>"),
    ([], "<thought>\n", "<thought>"),
    ([], "{# ◁think▷ #}", "◁think▷"),
    ([], "{# [BEGIN FINAL RESPONSE] #}", "Here are my reasoning steps:"),
    ([], "{# Here is my response: #}", "Here is my thought process:"),
    (["<|inner_prefix|>", "<|inner_suffix|>"], "", "<|inner_prefix|>"),
    (["<|begin|>", "<|think|>", "<|content|>", "<|end|>"], "", "<|think|>"),
]


@pytest.mark.parametrize(("tokens", "template", "opening"), SPELLED, ids=[opening for *_, opening in SPELLED])
def test_marks_of_more_families_are_known(
    with_template: Callable[..., Any], tokens: list[str], template: str, opening: str
) -> None:
    marks = find_marks(tokens, template)
    assert marks is not None
    assert marks.opening.strip() == opening
    used = with_template(f"{TURNS}{BEGIN}{template}", *tokens)
    own = {used.convert_tokens_to_ids(token) for token in tokens}
    spelled = render_prompt(used, [Message("user", f"Say {' '.join(marks.meanings)} twice.")])
    assert not own & set(spelled.token_ids[: -len(tokens) or None])


WRAPPED = "{# <think> <answer> </answer> #}"


@pytest.mark.parametrize(
    ("said", "state", "answer"),
    [
        ("<think>a</think>\n<answer>\nKeep them.\n</answer>", "before", "Keep them."),
        ("<answer>Keep them.</answer>\n", "closed", "Keep them."),
        ("a</think><answer>Say <answer> and </answer> then.</answer>", "open", "Say <answer> and </answer> then."),
        ("<think>a</think>Keep them.</answer>", "before", "Keep them.</answer>"),
        ("<think>a</think>\n\n<answer>Keep", "before", "Keep"),
        ("<think>a</think><ans", "before", "<ans"),
        ("<answer>Keep them.</answer>", "before", "<answer>Keep them.</answer>"),
        (" them.</answer>", "said", " them."),
    ],
)
def test_what_wraps_an_answer_behind_a_thought_is_no_part_of_it(said: str, state: AnswerState, answer: str) -> None:
    """Hunyuan's <answer>, Granite's <response>."""
    for chunks in ([said], list(said)):
        assert split_answer(chunks, state) == answer


@settings(max_examples=80)
@given(
    parts=st.lists(st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "</ans", "a b", " ", "\n"])),
    sizes=st.lists(st.integers(0, 5), max_size=30),
    state=st.sampled_from(["before", "open", "closed", "said"]),
)
def test_chunks_change_nothing_of_what_wraps_an_answer(parts: list[str], sizes: list[int], state: AnswerState) -> None:
    whole, chunks, start = "".join(parts), [], 0
    for size in sizes:
        chunks.append(whole[start : start + size])
        start += size
    assert split_answer([*chunks, whole[start:]], state) == split_answer([whole], state)


def split_answer(chunks: list[str], state: AnswerState) -> str:
    splitter = ThoughtSplitter(find_marks([], WRAPPED), state)
    pieces = [*(piece for chunk in chunks for piece in splitter.text(chunk)), *splitter.finish()]
    return "".join(said for channel, said in pieces if channel == "answer")
