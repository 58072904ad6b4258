"""What cannot be answered: an error in OpenAI's shape with the right status, and the server goes on."""

from __future__ import annotations

import contextlib
import json
import socket
from types import SimpleNamespace
from typing import Any, cast, get_type_hints

import httpx
import openai
import pytest
from langchain_core.exceptions import ContextOverflowError
from langchain_openai import ChatOpenAI
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming
from pydantic import SecretStr, ValidationError
from staged_server import CALM, Log, Served, running, scripted

from tta_middleware import TTAChatModel
from tta_middleware.engines.prompt.vocabulary import Vocabulary
from tta_middleware.errors import ModelNotFoundError, ModerationUnavailableError
from tta_middleware.server.chat_request import ChatRequest
from tta_middleware.server.responses_request import ResponseRequest
from tta_middleware.testing.scripted_engine import ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging

ROSES: Any = [{"role": "user", "content": "Roses?"}]
IMAGE: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]
WATER = {"type": "function", "function": {"name": "water"}}
SECRET = "a-word-of-the-prompt"

BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "an unknown field": ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
    "log-probabilities": ({"logprobs": True}, "logprobs", "withheld"),
    "no choice": ({"n": 0}, "n", "greater than"),
    "more choices than are allowed": ({"n": 9}, "n", "at most 8"),
    "a penalty": ({"presence_penalty": 1.5}, "presence_penalty", "not supported"),
    "old functions": ({"functions": []}, "functions", "use tools"),
    "an image": ({"messages": IMAGE}, "messages[0].content", "reads text only, not 'image_url'"),
    "a wrong role": ({"messages": [{"role": "wizard", "content": SECRET}]}, "messages[0]", "wizard"),
    "no messages": ({"messages": []}, "messages", "at least 1"),
    "nobody who asks": ({"messages": [{"role": "assistant", "content": SECRET}]}, "", "user"),
    "content that is a number": ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "string"),
    "an unknown part of a turn": (
        {"messages": [{"role": "user", "content": SECRET, "mood": "x"}]},
        "messages[0].mood",
        "leave it out",
    ),
    "a slip within a part": ({"tta": {"treshold": 0.1}}, "tta.treshold", "did you mean 'threshold'"),
    "a slip within a turn": (
        {"messages": [{"role": "user", "content": SECRET, "nam": "x"}]},
        "messages[0].nam",
        "did you mean 'name'",
    ),
    "a temperature that is text": ({"temperature": "1"}, "temperature", "number"),
    "no tokens": ({"max_tokens": 0}, "max_tokens", "greater than"),
    "two numbers of tokens": ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "another name"),
    "more tokens than are allowed": ({"max_tokens": 1000}, "max_completion_tokens", "at most 500"),
    "too many stops": ({"stop": ["a"] * 17}, "stop", "at most 16"),
    "an empty stop": ({"stop": [""]}, "", "empty"),
    "a choice without tools": ({"tool_choice": "required"}, "tool_choice", "needs tools"),
    "a choice of no function": (
        {"tools": [WATER], "tool_choice": {"type": "function", "function": None}},
        "",
        "tool's name (water)",
    ),
    "a choice whose name is a list": (
        {"tools": [WATER], "tool_choice": {"name": ["water"]}},
        "",
        "tool's name (water)",
    ),
    "a policy for the output that is none": (
        {"moderation": {"model": "m", "policy": {"output": {"mode": "off"}}}},
        "moderation.policy.output.mode",
        "score",
    ),
}


DEEP = '{"a":' * 400 + "1" + "}" * 400
CALLED = [{"id": "a", "type": "function", "function": {"name": "f", "arguments": DEEP}}]

BAD |= {
    "arguments of a call without end": (
        {"messages": [*ROSES, {"role": "assistant", "tool_calls": CALLED}, *ROSES]},
        "",
        "nested deeper",
    ),
    "a schema without end": ({"response_format": json.loads(DEEP)}, "", "nested deeper"),
}


@pytest.fixture(scope="module")
def strict() -> Any:
    with running(scripted(), limits={"max_tokens": 500, "body_bytes": 50_000}) as one:
        yield one


@pytest.mark.parametrize("name", BAD)
def test_a_request_that_cannot_be_answered(strict: Served, name: str) -> None:
    changed, param, words = BAD[name]
    body = {"model": "roses", "messages": ROSES, **changed}
    answer = httpx.post(f"{strict.url}/v1/chat/completions", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"] or "") == ("invalid_request_error", param)
    assert words in error["message"]
    assert SECRET not in answer.text
    assert httpx.post(f"{strict.url}/v1/chat/completions", json={"model": "roses", "messages": ROSES}).is_success


def test_the_log_tells_why_a_request_was_refused(log: Log) -> None:
    with running(scripted()) as served:
        for changed in ({"model": "lost"}, {SECRET: 1}):
            httpx.post(f"{served.url}/v1/chat/completions", json={"model": "roses", "messages": ROSES} | changed)
        httpx.post(f"{served.url}/v1/lost")
    assert log.request(status=404, code="model_not_found")
    assert log.request(status=400, code="unknown_parameter")
    assert log.request(path="/v1/lost", code="unknown_url")
    assert SECRET not in "".join(log.lines)


MANY = 1_200


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [0] * MANY},
        {"messages": [{"role": "assistant", "tool_calls": [0] * MANY}]},
        {"messages": ROSES, "tools": [0] * MANY},
        {"input": [0] * MANY},
        {"input": "x", "tools": [0] * MANY},
    ],
    ids=["messages", "calls", "tools", "input", "a response's tools"],
)
def test_a_list_is_read_up_to_its_first_fault(body: dict[str, Any]) -> None:
    """One body may hold millions, and putting each into words would hold up everybody else's answers."""
    kind = ResponseRequest if "input" in body else ChatRequest
    with pytest.raises(ValidationError) as found:
        kind.model_validate({"model": "roses", **body})
    assert found.value.error_count() == 1


@pytest.mark.parametrize("where", [(), ("tta", "categories")])
def test_of_very_many_faults_their_number_is_told(strict: Served, where: tuple[str, ...]) -> None:
    faults: Any = {f"field{number}": "x" for number in range(MANY)}
    for name in reversed(where):
        faults = {name: faults}
    answer = httpx.post(f"{strict.url}/v1/chat/completions", json={"model": "roses", "messages": ROSES, **faults})
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, f"the body has {MANY} faults")


def test_fields_that_are_null_say_nothing(strict: Served) -> None:
    names = set(get_type_hints(CompletionCreateParamsNonStreaming)) - {"model", "messages"}
    body = {"model": "roses", "messages": ROSES, **dict.fromkeys(names)}
    answer = httpx.post(f"{strict.url}/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text


def test_bodies_that_are_no_objects(strict: Served) -> None:
    url = f"{strict.url}/v1/chat/completions"
    endless = b'{"seed": ' + b"9" * 5_000 + b"}"
    for body in (b"", b"{", b"[]", b"\xff\xfe", b'{"messages": ' + b"[" * 20_000, endless):
        answer = httpx.post(url, content=body)
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    large = httpx.post(url, json={"model": "roses", "messages": [{"role": "user", "content": "x" * 60_000}]})
    assert (large.status_code, large.json()["error"]["code"]) == (413, "too_large")
    surrogate = httpx.post(url, content=b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}')
    assert (surrogate.status_code, surrogate.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
@pytest.mark.parametrize("path", ["chat/completions", "responses"])
def test_numbers_that_json_does_not_have(strict: Served, path: str, number: str) -> None:
    function: Any = {"name": "f", "parameters": {"minimum": "NUMBER"}}
    tool = {"type": "function", **(function if path == "responses" else {"function": function})}
    asked = {"input": "Roses?"} if path == "responses" else {"messages": ROSES}
    content = json.dumps({"model": "roses", **asked, "tools": [tool]}).replace('"NUMBER"', number)
    answer = httpx.post(f"{strict.url}/v1/{path}", content=content)
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "the body is not valid JSON")


def test_half_a_request_and_a_flood_of_headers(strict: Served) -> None:
    address = ("127.0.0.1", int(strict.url.rpartition(":")[2]))
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: here\r\n"
    for more in (b"Content-Length: 100\r\n\r\n{", b"".join(b"h%d: %s\r\n" % (n, b"x" * 900) for n in range(200))):
        with socket.create_connection(address) as connection, contextlib.suppress(ConnectionError):
            connection.sendall(head + more)
    assert httpx.post(f"{strict.url}/v1/chat/completions", json={"model": "roses", "messages": ROSES}).is_success


def test_paths_and_methods_that_are_not_served(served: Served, log: Log) -> None:
    lost = httpx.get(f"{served.url}/v1/engines")
    assert (lost.status_code, lost.json()["error"]["code"]) == (404, "unknown_url")
    wrong = httpx.get(f"{served.url}/v1/chat/completions")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_supported")
    assert wrong.headers["allow"] == "POST"
    elsewhere = httpx.post(f"{served.url}/v1/chat/completions/", json={"model": "roses", "messages": ROSES})
    assert (elsewhere.status_code, elsewhere.json()["error"]["code"]) == (404, "unknown_url")
    for answer in (lost, wrong, elsewhere):
        assert log.request(id=answer.headers["x-request-id"], status=answer.status_code)


class ShortContext(ScriptedEngine):
    """Reads less than it is asked to, and says so as a real one does."""

    async def embed(self, *args: Any, **settings: Any) -> Any:
        Vocabulary.check_length(cast(Vocabulary, SimpleNamespace(context=10)), 11)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_conversation_that_is_too_long(streaming: bool) -> None:
    with running(TTAChatModel(model=ShortContext("-"), moderator=ScriptedModerator())) as one:
        api = openai.OpenAI(base_url=f"{one.url}/v1", api_key="none")
        with api, pytest.raises(openai.BadRequestError) as bad:
            api.chat.completions.create(model="roses", messages=ROSES, stream=streaming)
        client = ChatOpenAI(base_url=f"{one.url}/v1", api_key=SecretStr("none"), model="roses", streaming=streaming)
        with pytest.raises(ContextOverflowError):
            client.invoke("Roses?")
    assert bad.value.code == "context_length_exceeded"


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_fails_before_any_text(stream: bool, log: Log) -> None:
    engine = ScriptedEngine(f"{SECRET} and more of it", fail_at_step=2)
    with running(scripted(engine=engine)) as served, served.client() as api:
        with pytest.raises(openai.InternalServerError) as raised:
            api.chat.completions.create(model="roses", messages=ROSES, stream=stream)
        after = api.chat.completions.create(model="roses", messages=ROSES)
    assert raised.value.code == "engine_error"
    assert after.choices[0].finish_reason == "stop"
    assert log.request(status=500)["error"] == "EngineError"
    assert SECRET not in "".join(log.lines)


def test_an_engine_that_fails_in_mid_stream_ends_it_with_an_error(log: Log) -> None:
    engine = ScriptedEngine(f"{CALM} " * 9, fail_at_step=170)
    body = {"model": "roses", "messages": ROSES, "stream": True}
    with running(scripted(engine=engine)) as served:
        answer = httpx.post(f"{served.url}/v1/chat/completions", json=body)
    *_, last = answer.text.strip().split("\n\n")
    assert answer.status_code == 200
    assert "Water" in answer.text
    assert last.startswith('event: error\ndata: {"error":{"message":"the model failed')
    assert "[DONE]" not in answer.text
    assert 'finish_reason":"' not in answer.text
    assert log.request(status=200)["error"] == "EngineError"


def test_the_client_hears_of_an_error_in_mid_stream() -> None:
    with running(scripted(engine=ScriptedEngine(f"{CALM} " * 9, fail_at_step=170))) as served, served.client() as api:
        stream = api.chat.completions.create(model="roses", messages=ROSES, stream=True)
        with pytest.raises(openai.APIError, match="the model failed"):
            list(stream)


def test_a_moderator_that_is_away_blocks_or_fails() -> None:
    def away(**policy: Any) -> TTAChatModel:
        failures = [ModerationUnavailableError("gone", cause="connection")] * 50
        return scripted(moderator=ScriptedModerator(score=flagging("x"), failures=failures), **policy)

    with running(away()) as served, served.client() as api:
        choice = api.chat.completions.create(model="roses", messages=ROSES).choices[0]
        assert choice.finish_reason == "content_filter"
        check = httpx.post(f"{served.url}/v1/checks", json={"text": "hello"})
    assert (check.status_code, check.json()["error"]["code"]) == (503, "unchecked")


def test_a_model_that_is_gone_and_an_error_of_nobody(log: Log) -> None:
    class Gone(ScriptedEngine):
        async def tool_format(self) -> Any:
            raise ModelNotFoundError("no model in /srv/secret-place")

    class Odd(ScriptedEngine):
        async def tool_format(self) -> Any:
            raise RuntimeError(SECRET)

    tool = {"type": "function", "function": {"name": "f"}}
    models = {"gone": scripted(engine=Gone("x")), "odd": scripted(engine=Odd("x"))}
    with running(models) as served:
        answers = [
            httpx.post(f"{served.url}/v1/chat/completions", json={"model": name, "messages": ROSES, "tools": [tool]})
            for name in models
        ]
    assert [one.status_code for one in answers] == [503, 500]
    assert [one.json()["error"]["code"] for one in answers] == ["model_unavailable", "internal_error"]
    assert "secret-place" not in answers[0].text
    assert SECRET not in answers[1].text + "".join(log.lines)
    assert any('"error": "RuntimeError", "at": "test_bad_requests.py' in line for line in log.lines)
