"""A model that thinks behind the server: where its thoughts stand in replies, and what a request may say of them."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from staged_server import CALM, THOUGHT, Served, running, thinking_model

ROSES: Any = [{"role": "user", "content": "How do I keep roses?"}]


def ask(served: Served, messages: Any = ROSES, **options: Any) -> Any:
    with served.client() as api:
        answer: Any = api.chat.completions.create(model="roses", messages=messages, **options)
        return list(answer) if options.get("stream") else answer


@pytest.mark.parametrize("mode", ["show", "hide", "off"])
def test_where_thoughts_stand(mode: str) -> None:
    shown = THOUGHT if mode == "show" else None
    with running(thinking_model(mode)) as served:
        answer = ask(served)
        chunks = ask(served, stream=True, stream_options={"include_usage": True})
    message = answer.choices[0].message
    assert message.content == CALM
    assert (getattr(message, "reasoning_content", None), getattr(message, "reasoning", None)) == (shown, shown)
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == CALM
    for field in ("reasoning_content", "reasoning"):
        assert "".join(getattr(delta, field, None) or "" for delta in deltas) == (shown or "")
    for usage in (answer.usage, chunks[-1].usage):
        details = usage.completion_tokens_details
        if mode == "off":
            assert details is None
        else:
            assert 10 < details.reasoning_tokens < usage.completion_tokens


def test_a_thought_without_end_is_no_answer_that_ended_well() -> None:
    with running(thinking_model("hide")) as served:
        answer = ask(served, max_tokens=10)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("", "length")
    assert answer.tta["outcome"] == "unanswered"


def test_arguments_of_the_template_come_with_a_request() -> None:
    with running(thinking_model("show")) as served:
        assert ask(served, reasoning_effort="low").choices[0].message.content == CALM
        told = {"chat_template_kwargs": {"enable_thinking": True}}
        assert ask(served, extra_body=told).choices[0].message.content == CALM
        with pytest.raises(openai.BadRequestError, match="words_of_mine"):
            ask(served, extra_body={"chat_template_kwargs": {"words_of_mine": 1}})


def test_earlier_thoughts_may_be_sent_back() -> None:
    earlier = {"role": "assistant", "content": CALM, "reasoning_content": THOUGHT}
    with running(thinking_model("show")) as served:
        answer = ask(served, [*ROSES, earlier, {"role": "user", "content": "And tulips?"}])
    assert answer.choices[0].message.content == CALM


def test_a_response_counts_thoughts_and_shows_none() -> None:
    with running(thinking_model("show")) as served, served.client() as api:
        answer = api.responses.create(model="roses", input="How do I keep roses?")
    assert answer.output_text == CALM
    assert [item.type for item in answer.output] == ["message"]
    assert answer.usage is not None
    assert answer.usage.output_tokens_details.reasoning_tokens > 10
