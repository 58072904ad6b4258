"""``POST /v1/responses`` as the openai client reads it: text, tools, blocks, events, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel
from staged_server import BAD, CALM, NOTICE, Log, Served, running, scripted
from staged_upstream import completion, saying, upstream, words

from tta_middleware.policy import Policy
from tta_middleware.testing.scripted_engine import ScriptedCall


class Flower(BaseModel):
    """A flower."""

    name: str
    petals: int


TOOL: Any = {
    "type": "function",
    "name": "Flower",
    "description": "A flower.",
    "parameters": {"type": "object", "properties": {"name": {"type": "string"}, "petals": {"type": "integer"}}},
    "strict": True,
}


def flowers(call: ScriptedCall) -> str:
    if "forbidden" in call.conversation:
        return "It stayed in the garden."
    if "a tool's word" in call.conversation:
        return "Five petals, it says."
    if "<|tools|>" in call.conversation:
        return 'Let me look.\n<tool_call>{"name": "Flower", "arguments": {"name": "rose", "petals": 5}}</tool_call>'
    if "JSON object" in call.conversation:
        return '{"name": "rose", "petals": 5}'
    return CALM


@pytest.fixture(scope="module")
def garden() -> Any:
    with running({"roses": scripted(flowers), "wild": scripted()}, keys="") as one:
        yield one


def create(served: Served, **asked: Any) -> Any:
    with served.client(_strict_response_validation=True) as api:
        found: Any = api.responses.create(**({"model": "wild", "input": "Roses?"} | asked))
        return list(found) if asked.get("stream") else found


def test_a_whole_response(garden: Served, log: Log) -> None:
    found = create(garden, instructions="Be kind.", metadata={"a": "b"}, max_output_tokens=90, temperature=0.0)
    assert (found.object, found.status, found.model, found.error) == ("response", "completed", "wild", None)
    assert (found.output_text, found.instructions, found.metadata) == (CALM, "Be kind.", {"a": "b"})
    [message] = found.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    assert found.usage.total_tokens == found.usage.input_tokens + found.usage.output_tokens > 20
    assert found.model_extra["tta"]["outcome"] == "clean"
    assert found.id.startswith("resp_")
    assert log.request(path="/v1/responses", model="wild", outcome="clean")


def test_the_events_of_a_stream(garden: Served) -> None:
    events = create(garden, stream=True)
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) > 2
    assert "".join(deltas) == events[-4].text == events[-1].response.output_text == CALM
    assert events[-1].response.usage.output_tokens > 0


async def test_the_async_client_and_its_helper(garden: Served) -> None:
    async with garden.aclient() as api:
        whole = await api.responses.create(model="wild", input=[{"role": "user", "content": "Roses?"}])
        async with api.responses.stream(model="wild", input="Roses?") as stream:
            async for _ in stream:
                pass
            final = await stream.get_final_response()
    assert whole.output_text == final.output_text == CALM


@pytest.mark.parametrize("stream", [False, True])
def test_a_block_is_incomplete_and_its_notice_a_refusal(garden: Served, stream: bool) -> None:
    found = create(garden, input="An attack, please.", stream=stream)
    if stream:
        events = found
        assert events[-1].type == "response.incomplete"
        found = events[-1].response
        assert "forbidden" not in str(events)
        assert [event.refusal for event in events if event.type == "response.refusal.done"] == [NOTICE]
        assert NOTICE not in "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert (found.status, found.incomplete_details.reason) == ("incomplete", "content_filter")
    [message] = found.output
    *text, refusal = message.content
    assert (refusal.type, refusal.refusal, message.status) == ("refusal", NOTICE, "incomplete")
    assert found.output_text == ("" if not stream else text[0].text)
    assert not stream or CALM.startswith(found.output_text[:40])


def test_what_is_too_long_is_incomplete(garden: Served) -> None:
    found = create(garden, max_output_tokens=2)
    assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")


@pytest.mark.parametrize("stream", [False, True])
def test_a_tools_round(garden: Served, stream: bool) -> None:
    asked: Any = {"model": "roses", "tools": [TOOL], "input": [{"role": "user", "content": "A flower"}]}
    found = create(garden, **asked, stream=stream)
    if stream:
        events = found
        [done] = [event for event in events if event.type == "response.function_call_arguments.done"]
        assert json.loads(done.arguments) == {"name": "rose", "petals": 5}
        found = events[-1].response
    message, call = found.output
    assert (message.content[0].text.strip(), message.status, call.type) == (
        "Let me look.",
        "completed",
        "function_call",
    )
    assert (call.name, json.loads(call.arguments)) == ("Flower", {"name": "rose", "petals": 5})
    items = [item.model_dump(exclude_none=True) for item in found.output]
    back = {"type": "function_call_output", "call_id": call.call_id, "output": "a tool's word"}
    final = create(garden, **(asked | {"input": [*asked["input"], *items, {"type": "reasoning", "summary": []}, back]}))
    assert final.output_text == "Five petals, it says."


def test_structured_output(garden: Served) -> None:
    with garden.client() as api:
        parsed = api.responses.parse(model="roses", input="A flower", text_format=Flower)
        with api.responses.stream(model="roses", input="A flower", text_format=Flower) as stream:
            list(stream)
            final = stream.get_final_response()
        blocked = api.responses.parse(model="wild", input="An attack, please.", text_format=Flower)
    assert parsed.output_parsed == final.output_parsed == Flower(name="rose", petals=5)
    assert (blocked.output_parsed, blocked.status) == (None, "incomplete")


def test_inline_moderation(garden: Served) -> None:
    asked: Any = {"model": "any", "policy": {"input": {"mode": "block"}}}
    found = create(garden, moderation=asked)
    assert (found.moderation.output.type, found.moderation.output.flagged) == ("moderation_result", False)
    blocked = create(garden, moderation=asked, input="forbidden?", stream=True)
    last = blocked[-1]
    assert last.response.moderation.input.flagged


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "an earlier response": ({"previous_response_id": "resp_1"}, "previous_response_id", "nothing is stored"),
    "a conversation": ({"conversation": "c"}, "conversation", "nothing is stored"),
    "the background": ({"background": True}, "background", "not supported"),
    "reasoning": ({"reasoning": {"effort": "high"}}, "reasoning", "not supported"),
    "log-probabilities": ({"top_logprobs": 3}, "top_logprobs", "withheld"),
    "what is to be included": ({"include": ["message.output_text.logprobs"]}, "include", "not supported"),
    "a tool that is no function": ({"tools": [{"type": "web_search"}]}, "tools[0]", "web_search"),
    "an image": (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}]},
        "input[0]",
        "reads text only, not 'input_image'",
    ),
    "an item that is none of ours": ({"input": [{"type": "computer_call_output"}]}, "input[0]", "computer_call_output"),
    "a reference": ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]", "nothing is stored"),
    "a wrong role": ({"input": [{"role": "wizard", "content": "x"}]}, "input[0]", "user"),
    "no input": ({"input": []}, "input", "at least 1"),
    "a field that is none": ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
    "verbosity": ({"text": {"verbosity": "high"}}, "text.verbosity", "medium"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(garden: Served, name: str) -> None:
    changed, param, words_ = REFUSED[name]
    answer = httpx.post(f"{garden.url}/v1/responses", json={"model": "wild", "input": "Roses?"} | changed)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith(param)
    assert words_ in error["message"]


def test_an_upstream_answers_responses_as_well() -> None:
    refusing = completion(None, refusal="I would rather not.")
    with upstream(lambda wire: wire.answer(refusing)) as behind, running({"wild": behind.model()}) as served:
        refused = create(served)
        behind.plan = saying(BAD)
        blocked = create(served)
        behind.plan = lambda wire: wire.stream([*words(CALM * 50), b'data: {"cut\n\n'], done=False)
        events = create(served, stream=True)
        with pytest.raises(openai.NotFoundError):
            create(served, model="none")
    assert [part.type for part in refused.output[0].content] == ["refusal"]
    assert blocked.incomplete_details.reason == "content_filter"
    assert (events[-1].type, events[-1].code) == ("error", "upstream_broken")
    assert events[-1].sequence_number == len(events) - 1


def test_what_is_only_observed_says_so() -> None:
    with running({"wild": scripted(policy=Policy(threshold=0.5, mode="observe"))}) as served:
        answer = httpx.post(f"{served.url}/v1/responses", json={"model": "wild", "input": "An attack, please."})
    assert answer.headers["x-tta-mode"] == "observe"
    assert answer.json()["output"][0]["content"][0]["text"] == BAD
