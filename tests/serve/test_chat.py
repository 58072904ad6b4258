"""Chat completions as the openai client sees them: whole and streamed, clean, repaired and blocked."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from staged_server import CALM, NOTICE, Log, Served, running, scripted

from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine

ROSES: Any = [{"role": "user", "content": "How do I keep roses?"}]
ATTACK: Any = [{"role": "user", "content": "An attack, please."}]


def ask(served: Served, messages: Any = ROSES, **options: Any) -> Any:
    with served.client() as api:
        return api.chat.completions.create(model="roses", messages=messages, **options)


def streamed(served: Served, messages: Any = ROSES, **options: Any) -> list[Any]:
    with served.client() as api:
        return list(api.chat.completions.create(model="roses", messages=messages, stream=True, **options))


def text_of(chunks: list[Any]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_a_whole_answer(served: Served, log: Log) -> None:
    with served.client() as api:
        raw = api.chat.completions.with_raw_response.create(model="roses", messages=ROSES)
    answer = raw.parse()
    choice = answer.choices[0]
    assert (choice.message.content, choice.message.refusal, choice.finish_reason) == (CALM, None, "stop")
    assert (answer.object, answer.model, answer.id[:9]) == ("chat.completion", "roses", "chatcmpl-")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens > 20
    assert answer.model_extra["tta"]["outcome"] == "clean"
    assert (raw.headers["x-tta-policy"], raw.headers["x-tta-outcome"]) == ("default", "clean")
    line = log.request(path="/v1/chat/completions")
    assert line["id"] == raw.headers["x-request-id"]
    assert (line["outcome"], line["completion_tokens"]) == ("clean", answer.usage.completion_tokens)
    assert not {"reason", "category", "score"} & line.keys()


def test_a_streamed_answer(served: Served) -> None:
    chunks = streamed(served, stream_options={"include_usage": True})
    assert text_of(chunks) == CALM
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len([chunk for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]) > 2
    *_, last, usage = chunks
    assert (last.choices[0].finish_reason, last.model_extra["tta"]["outcome"]) == ("stop", "clean")
    assert usage.choices == []
    assert usage.usage.completion_tokens > 20
    assert {chunk.id for chunk in chunks} == {usage.id}


async def test_the_async_client(served: Served) -> None:
    async with served.aclient() as api:
        stream = await api.chat.completions.create(model="roses", messages=ROSES, stream=True)
        chunks = [chunk async for chunk in stream]
        whole = await api.chat.completions.create(model="roses", messages=ROSES)
    assert text_of(chunks) == whole.choices[0].message.content == CALM


def test_the_stream_on_the_wire_ends_with_done(served: Served) -> None:
    body = {"model": "roses", "messages": ROSES, "stream": True}
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.strip().split("\n\n")
    assert all(event.startswith("data: ") for event in events)
    assert events[-1] == "data: [DONE]"
    assert [json.loads(event[6:])["choices"][0]["finish_reason"] for event in events[:-1]].count("stop") == 1


def test_instructions_alone_are_what_is_answered(served: Served) -> None:
    calm = ask(served, [{"role": "system", "content": "Be kind."}, {"role": "developer", "content": "Roses?"}])
    attack = ask(served, [{"role": "developer", "content": "An attack, please."}])
    assert (text_of_whole(calm), text_of_whole(attack)) == (CALM, NOTICE)


def text_of_whole(answer: Any) -> str:
    return str(answer.choices[0].message.content)


def test_a_blocked_answer_is_an_answer(served: Served, log: Log) -> None:
    answer = ask(served, ATTACK)
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.message.refusal, choice.message.content) == ("content_filter", NOTICE, NOTICE)
    trace = answer.model_extra["tta"]
    assert trace["outcome"] == "blocked"
    line = log.request(path="/v1/chat/completions")
    assert (line["outcome"], line["reason"]) == ("blocked", trace["stop_reason"])
    assert (line["category"], line["score"]) == (trace["baseline"]["category"], trace["baseline"]["score"])


def test_a_stream_that_is_blocked_ends_well(served: Served) -> None:
    chunks = streamed(served, ATTACK, stream_options={"include_usage": True})
    text = text_of(chunks)
    assert text.startswith("Water the roses")
    assert text.endswith(f"\n\n{NOTICE}")
    assert "forbidden" not in text
    *_, last, usage = chunks
    assert (last.choices[0].finish_reason, last.choices[0].delta.refusal) == ("content_filter", NOTICE)
    assert usage.usage.total_tokens > 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_raises_blocks_like_any_other(stream: bool) -> None:
    with running(scripted(fallback="raise")) as served:
        if stream:
            chunks = streamed(served, ATTACK)
            text, reason = text_of(chunks), chunks[-1].choices[0].finish_reason
            refusal = chunks[-1].choices[0].delta.refusal
        else:
            [choice] = ask(served, ATTACK).choices
            text, reason, refusal = choice.message.content, choice.finish_reason, choice.message.refusal
    assert (reason, refusal) == ("content_filter", NOTICE)
    assert text.endswith(NOTICE)
    assert "forbidden" not in text


def test_a_late_flag_is_repaired_in_the_stream() -> None:
    with running(scripted(method="race")) as served:
        chunks = streamed(served, [{"role": "user", "content": "Roses, and a late word about them."}])
    text, last = text_of(chunks), chunks[-1]
    trace = last.model_extra["tta"]
    assert (trace["outcome"], last.choices[0].finish_reason) == ("neutralised", "stop")
    assert trace["seam"] > 0
    assert text.startswith(CALM[: trace["seam"]])
    assert "forbidden" not in text


def conversation(call: ScriptedCall) -> str:
    return call.conversation.replace("<|", "[").replace("|>", "] ")


def test_the_whole_conversation_reaches_the_model() -> None:
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": " rose"}]},
        {"role": "assistant", "content": None, "refusal": "Not roses.", "annotations": []},
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": "Two"},
    ]
    with running(scripted(conversation)) as served:
        text = ask(served, messages).choices[0].message.content
    assert text == "[system] Be short.[user] One rose[assistant] Not roses.[system] Be kind.[user] Two"


def test_what_a_client_may_set() -> None:
    with running(scripted()) as served:
        short = ask(
            served, max_completion_tokens=3, temperature=0.5, top_p=0.9, seed=-7, n=1, user="me", logprobs=False
        )
        stopped = ask(served, stop=["the roses"])
    assert (short.choices[0].message.content, short.choices[0].finish_reason) == ("Water the roses", "length")
    assert short.model_extra["tta"]["seed"] == 2**31 - 7
    assert stopped.choices[0].message.content == "Water "


def test_a_response_format_instructs_the_model() -> None:
    def script(call: ScriptedCall) -> str:
        return '{"flower": "rose"}' if "JSON object" in call.conversation else "rose"

    schema = {"type": "json_schema", "json_schema": {"name": "flower", "schema": {"type": "object"}}}
    with running(scripted(script)) as served:
        answers = [
            ask(served, response_format=wanted) for wanted in ({"type": "json_object"}, schema, {"type": "text"})
        ]
        with pytest.raises(openai.BadRequestError, match="response_format"):
            ask(served, response_format={"type": "grammar"})
    assert [one.choices[0].message.content for one in answers] == ['{"flower": "rose"}', '{"flower": "rose"}', "rose"]


def test_models_are_listed_and_chosen_by_name() -> None:
    models = {"roses": scripted(), "echo": scripted(lambda call: call.text)}
    with running(models) as served, served.client() as api:
        assert [model.id for model in api.models.list()] == ["roses", "echo"]
        assert api.models.retrieve("echo").owned_by == "tta-middleware"
        assert (
            api.chat.completions.create(model="echo", messages=ROSES).choices[0].message.content == ROSES[0]["content"]
        )
        with pytest.raises(openai.NotFoundError) as raised:
            api.chat.completions.create(model="tulips", messages=ROSES)
    assert raised.value.code == "model_not_found"


TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "opening_hours",
            "description": "When a place opens.",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
        },
    }
]


def with_tools(call: ScriptedCall) -> str:
    if "<|tool|>" in call.conversation:
        return f"The garden opens at {call.conversation.rpartition('<|tool|>')[2]}."
    if "harm" in call.text:
        return '<tool_call>{"name": "opening_hours", "arguments": {"place": "the \\u0066orbidden one"}}</tool_call>'
    if "broken" in call.text:
        return '<tool_call>{"name": "opening_hours", "arguments": {"place": </tool_call>'
    if "<tool_call>" in call.prefix:
        return ' {"place": "garden"}}\n</tool_call>'
    return 'Let me see. <tool_call>{"name": "opening_hours", "arguments": {"place": "garden"}}</tool_call>'


def test_a_tool_is_called_and_its_result_read() -> None:
    with running(scripted(with_tools)) as served:
        first = ask(served, tools=TOOLS).choices[0]
        [call] = first.message.tool_calls
        result = {"role": "tool", "tool_call_id": call.id, "content": "nine"}
        second = ask(served, [*ROSES, first.message, result], tools=TOOLS)
    assert first.finish_reason == "tool_calls"
    assert (call.function.name, json.loads(call.function.arguments)) == ("opening_hours", {"place": "garden"})
    assert second.choices[0].message.content == "The garden opens at nine."


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_in_tags_is_an_openai_call_typed_by_its_schema(stream: bool) -> None:
    text = "<tool_call>\n<function=opening_hours>\n<parameter=place>\n{}\n</parameter>\n</function>\n</tool_call>"

    def script(call: ScriptedCall) -> str:
        return text.format("the \\u0066orbidden one" if "harm" in call.text else "5")

    with running(scripted(engine=ScriptedEngine(script, tools="qwen3_coder"))) as served:
        found = streamed(served, tools=TOOLS) if stream else [ask(served, tools=TOOLS)]
        harm = [{"role": "user", "content": "harm"}]
        blocked = streamed(served, harm, tools=TOOLS) if stream else [ask(served, harm, tools=TOOLS)]
    parts = [chunk.choices[0].delta if stream else chunk.choices[0].message for chunk in found]
    calls = [call.function for part in parts for call in part.tool_calls or ()]
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [("opening_hours", {"place": "5"})]
    assert found[-1].choices[0].finish_reason == "tool_calls"
    assert "orbidden" not in str(blocked)
    assert blocked[-1].choices[0].finish_reason == "content_filter"


def test_a_streamed_tool_call_comes_whole() -> None:
    with running(scripted(with_tools)) as served:
        chunks = streamed(served, tools=TOOLS, tool_choice="auto", parallel_tool_calls=True)
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert [(call.index, call.type, json.loads(call.function.arguments)) for call in calls] == [
        (0, "function", {"place": "garden"})
    ]
    assert text_of(chunks).strip() == "Let me see."
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
def test_what_a_call_says_once_decoded_is_judged(stream: bool) -> None:
    with running(scripted(with_tools)) as served:
        harm: Any = [{"role": "user", "content": "harm"}]
        found = streamed(served, harm, tools=TOOLS) if stream else [ask(served, harm, tools=TOOLS)]
    assert found[-1].choices[0].finish_reason == "content_filter"
    assert "orbidden" not in "".join(one.model_dump_json() for one in found)


def test_a_broken_call_is_text() -> None:
    broken: Any = [{"role": "user", "content": "broken"}]
    with running(scripted(with_tools)) as served:
        whole = ask(served, broken, tools=TOOLS).choices[0]
        chunks = streamed(served, broken, tools=TOOLS)
    assert whole.message.tool_calls is None
    assert whole.finish_reason == "stop"
    assert text_of(chunks) == whole.message.content
    assert "opening_hours" in whole.message.content


def test_a_model_that_does_not_stream_gives_a_stream_of_one_piece() -> None:
    with running(scripted(with_tools, streaming=False)) as served:
        chunks = streamed(served, tools=TOOLS, moderation={"model": "m"})
        broken = streamed(served, [{"role": "user", "content": "broken"}], tools=TOOLS)
        blocked = streamed(served, [{"role": "user", "content": "harm"}], tools=TOOLS)
    [call] = [call for chunk in chunks if chunk.choices for call in chunk.choices[0].delta.tool_calls or ()]
    assert (call.function.name, text_of(chunks).strip()) == ("opening_hours", "Let me see.")
    assert chunks[-1].moderation.output.results[0].flagged is False
    assert "opening_hours" in text_of(broken)
    assert (text_of(blocked), blocked[-1].choices[0].finish_reason) == (NOTICE, "content_filter")


def test_a_tool_can_be_demanded() -> None:
    named: Any = {"type": "function", "function": {"name": "opening_hours"}}
    with running(scripted(with_tools)) as served:
        answers = [ask(served, tools=TOOLS, tool_choice=choice).choices[0] for choice in ("required", named)]
        with pytest.raises(openai.BadRequestError, match="tool_choice"):
            ask(served, tools=TOOLS, tool_choice="mandatory")
    assert [one.finish_reason for one in answers] == ["tool_calls", "tool_calls"]


def test_an_engine_that_takes_no_tools_says_so() -> None:
    without = scripted(engine=ScriptedEngine("x", tools=None))
    with running(without) as served, pytest.raises(openai.BadRequestError, match="tools"):
        ask(served, tools=TOOLS)
