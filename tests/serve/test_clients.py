"""Other clients of OpenAI's protocol: LangChain's, the openai client's helpers, curl."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

import pytest
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
from staged_server import CALM, NOTICE, Served, running, scripted

from tta_middleware.testing.scripted_engine import ScriptedCall


class Flower(BaseModel):
    """A flower."""

    name: str
    petals: int


def flowers(call: ScriptedCall) -> str:
    if "<tool_call>" in call.prefix:
        return ' {"name": "rose", "petals": 5}}\n</tool_call>'
    if "JSON object" in call.conversation:
        return '{"name": "rose", "petals": 5}'
    if "<|tools|>" in call.conversation:
        return '<tool_call>{"name": "Flower", "arguments": {"name": "rose", "petals": 5}}</tool_call>'
    return CALM


def chat(served: Served, **options: Any) -> ChatOpenAI:
    return ChatOpenAI(model="roses", base_url=f"{served.url}/v1", api_key="none", max_retries=0, **options)


def test_langchains_client(served: Served) -> None:
    model = chat(served, temperature=0.2, max_tokens=100, stream_usage=True)
    whole, chunks = model.invoke("Roses?"), list(model.stream("Roses?"))
    blocked = model.invoke("An attack, please.")
    assert whole.text == "".join(chunk.text for chunk in chunks) == CALM
    assert whole.usage_metadata == sum_of(chunks).usage_metadata
    assert (blocked.response_metadata["finish_reason"], blocked.additional_kwargs["refusal"]) == (
        "content_filter",
        NOTICE,
    )


def sum_of(chunks: list[Any]) -> Any:
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    return total


@pytest.mark.parametrize("method", ["json_schema", "json_mode", "function_calling"])
def test_langchains_structured_output(method: Any) -> None:
    with running(scripted(flowers)) as served:
        asked = chat(served).with_structured_output(Flower, method=method)
        assert asked.invoke("A flower") == Flower(name="rose", petals=5)


def test_langchains_tools_in_a_stream() -> None:
    with running(scripted(flowers)) as served:
        asked = chat(served).bind_tools([Flower], parallel_tool_calls=False)
        message = sum_of(list(asked.stream("A flower")))
    [call] = message.tool_calls
    assert (call["name"], call["args"]) == ("Flower", {"name": "rose", "petals": 5})


def test_the_openai_clients_helpers() -> None:
    messages: Any = [{"role": "user", "content": "A flower"}]
    with running(scripted(flowers)) as served, served.client() as api:
        parsed = api.chat.completions.parse(model="roses", messages=messages, response_format=Flower)
        with api.chat.completions.stream(model="roses", messages=messages, response_format=Flower) as stream:
            kinds = {event.type for event in stream}
            final = stream.get_final_completion()
    assert parsed.choices[0].message.parsed == final.choices[0].message.parsed == Flower(name="rose", petals=5)
    assert {"content.delta", "content.done"} <= kinds


def test_the_openai_clients_parse_of_a_block(served: Served) -> None:
    messages: Any = [{"role": "user", "content": "An attack, please."}]
    from openai import ContentFilterFinishReasonError

    with served.client() as api, pytest.raises(ContentFilterFinishReasonError):
        api.chat.completions.parse(model="roses", messages=messages, response_format=Flower)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(served: Served) -> None:
    body = json.dumps({"model": "roses", "stream": True, "messages": [{"role": "user", "content": "Roses?"}]})
    command = ["curl", "-sN", f"{served.url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.endswith("data: [DONE]\n\n")
