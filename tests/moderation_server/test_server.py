"""The moderation server as its clients see it: openai (sync and async), LangChain's middleware, curl, plain HTTP."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager

import anyio
import httpx
import openai
import pytest
from langchain.agents import create_agent
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_openai.middleware import OpenAIModerationMiddleware

from tta_middleware.errors import ConfigurationError, ModerationUnavailableError
from tta_middleware.moderation.adapters.runnable import RunnableModerator
from tta_middleware.moderation.embedded import EmbeddedModerator
from tta_middleware.moderation.embedded.moderator import MODEL
from tta_middleware.moderation.server import create_app, serve
from tta_middleware.testing.loopback import on_loopback
from tta_middleware.types import CATEGORIES, Verdict

HARMLESS = "To bake a loaf of bread, mix flour, water, salt and yeast."
INSULT = "You are a worthless stupid idiot and everybody hates you."

Serving = Callable[..., AbstractContextManager[str]]


def client(url: str, **options: object) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=str(options.pop("api_key", "none")), max_retries=0)


def test_openai_client_with_one_string(url: str) -> None:
    with client(url) as api:
        answer = api.moderations.create(model="omni-moderation-latest", input=INSULT)
    assert answer.id.startswith("modr-")
    assert answer.model == "omni-moderation-latest"
    assert [result.flagged for result in answer.results] == [True]
    scores = answer.results[0].category_scores.model_dump(by_alias=True)
    assert tuple(sorted(scores)) == CATEGORIES
    assert scores == dict(EmbeddedModerator().score([INSULT])[0].scores)
    assert answer.results[0].categories.harassment is True


def test_openai_client_with_a_list(url: str) -> None:
    with client(url) as api:
        answer = api.moderations.create(input=[HARMLESS, INSULT, ""])
    assert [result.flagged for result in answer.results] == [False, True, False]
    assert answer.model == MODEL


def test_text_objects_are_one_input(url: str) -> None:
    with client(url) as api:
        items = [{"type": "text", "text": HARMLESS}, {"type": "text", "text": INSULT}]
        answer = api.moderations.create(input=items)  # type: ignore[arg-type]
    assert len(answer.results) == 1
    assert answer.results[0].category_applied_input_types.harassment == ["text"]


async def test_async_openai_client(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as api:
        answer = await api.moderations.create(input=[HARMLESS, INSULT])
    assert [result.flagged for result in answer.results] == [False, True]


@pytest.mark.parametrize("users", [3, pytest.param(10, marks=pytest.mark.slow)])
async def test_many_users_with_a_hundred_concurrent_requests_each(url: str, users: int) -> None:
    flags: list[bool] = []

    async def ask(http: httpx.AsyncClient, number: int) -> None:
        text = INSULT if number % 2 else HARMLESS
        answer = await http.post("/v1/moderations", json={"input": f"{text} {number}"})
        flags.append(answer.raise_for_status().json()["results"][0]["flagged"] is bool(number % 2))

    async def user(first: int) -> None:
        limits = httpx.Limits(max_connections=20)
        async with (
            httpx.AsyncClient(base_url=url, limits=limits, timeout=60) as http,
            anyio.create_task_group() as group,
        ):
            for number in range(first, first + 100):
                group.start_soon(ask, http, number)

    async with anyio.create_task_group() as group:
        for first in range(0, users * 100, 100):
            group.start_soon(user, first)
    assert len(flags) == users * 100
    assert all(flags)


@pytest.mark.parametrize(("question", "blocked"), [(HARMLESS, False), (INSULT, True)])
async def test_langchain_moderation_middleware(url: str, question: str, blocked: bool) -> None:
    with client(url) as sync_api:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as async_api:
            guard = OpenAIModerationMiddleware(client=sync_api, async_client=async_api, exit_behavior="end")
            agent = create_agent(FakeListChatModel(responses=["Fine."]), middleware=[guard])
            message = {"messages": [{"role": "user", "content": question}]}
            for state in (agent.invoke(message), await agent.ainvoke(message)):
                assert (state["messages"][-1].content != "Fine.") is blocked


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(url: str) -> None:
    body = json.dumps({"input": INSULT})
    command = ["curl", "-sS", "-H", "Content-Type: application/json", "-d", body, f"{url}/v1/moderations"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["results"][0]["flagged"] is True


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b"{}", "Missing required parameter"),
        (b'{"input": 3}', "string or a list"),
        (b'{"input": []}', "not empty"),
        (b'{"input": ["a", 3]}', "strings only"),
        (b'{"input": [{"type": "image_url", "image_url": {"url": "data:"}}]}', "no images"),
        (b'{"input": "a", "model": 3}', "'model' must be a string"),
        (json.dumps({"input": ["a"] * 257}).encode(), "at most 256"),
        (b'{"input": "\xff"}', "not valid JSON"),
    ],
)
def test_bad_requests_are_explained_in_openai_shape(url: str, body: bytes, says: str) -> None:
    answer = httpx.post(f"{url}/v1/moderations", content=body)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert says in error["message"]


def test_openai_client_raises_its_own_errors(url: str) -> None:
    with client(url) as api, pytest.raises(openai.BadRequestError, match="not empty"):
        api.moderations.create(input=[])


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/moderations", 405), ("POST", "/v1/chat", 404)])
def test_unknown_paths_and_methods(url: str, method: str, path: str, status: int) -> None:
    answer = httpx.request(method, f"{url}{path}")
    assert answer.status_code == status
    assert "is not served here" in answer.json()["error"]["message"]


def test_health(url: str) -> None:
    assert httpx.get(f"{url}/health").json()["status"] == "ok"


def test_lone_surrogates_and_nulls_are_scored(url: str) -> None:
    answer = httpx.post(f"{url}/v1/moderations", content=rb'{"input": "\ud800 you \u0000 stupid idiot"}')
    assert answer.json()["results"][0]["flagged"] is True


def test_bodies_over_the_limit_are_refused(serving: Serving) -> None:
    def stream() -> object:
        yield b'{"input": "' + b"a" * 300 + b'"}'

    with serving(max_body_bytes=256) as url:
        for content in ("a" * 300, stream()):
            answer = httpx.post(f"{url}/v1/moderations", content=content)  # type: ignore[arg-type]
            assert answer.status_code == 413
            assert "larger than 256 bytes" in answer.json()["error"]["message"]


def test_a_key_is_asked_for_when_set(serving: Serving) -> None:
    with serving(api_key="s3cret") as url:
        with client(url, api_key="s3cret") as api:
            assert not api.moderations.create(input=HARMLESS).results[0].flagged
        with client(url, api_key="wrong") as api, pytest.raises(openai.AuthenticationError) as caught:
            api.moderations.create(input=HARMLESS)
        assert "s3cret" not in str(caught.value)
        assert httpx.post(f"{url}/v1/moderations", json={"input": "a"}).status_code == 401


@pytest.mark.parametrize("key", ["s3cret", "schlüssel", "voilà"])
def test_a_key_is_taken_as_the_other_server_takes_it(serving: Serving, key: str) -> None:
    def status(url: str, given: bytes) -> int:
        headers = [(b"authorization", given)]
        return httpx.post(f"{url}/v1/moderations", json={"input": "a"}, headers=headers).status_code

    with serving(api_key=key) as url:
        said = key.encode()
        assert status(url, b"Bearer " + said) == status(url, b"bearer  " + said) == 200
        assert {status(url, given) for given in (said, b"Basic " + said, b"Bearer")} == {401}


class Broken(EmbeddedModerator):
    """Fails as a remote moderator would."""

    closed = False

    async def moderate(self, texts: object, *, prompt: str | None = None) -> list[Verdict]:
        raise ModerationUnavailableError("no route to the secret host")

    async def aclose(self) -> None:
        self.closed = True


async def test_a_failing_moderator_is_no_pass_and_leaks_nothing() -> None:
    transport = httpx.ASGITransport(create_app(Broken()))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        answer = await http.post("/v1/moderations", json={"input": "a"})
    assert answer.status_code == 503
    assert answer.json()["error"]["type"] == "server_error"
    assert "secret" not in answer.text


async def test_a_bug_of_a_moderators_own_is_answered_and_its_message_is_in_no_log(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(text: str) -> float:
        raise RuntimeError(f"cannot read {text!r}")

    caplog.set_level("DEBUG")
    with on_loopback(create_app(RunnableModerator(broken, name="own"))) as served:
        async with httpx.AsyncClient(base_url=served.url) as api:
            answer = await api.post("/v1/moderations", json={"input": INSULT})
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert "moderator 'own' failed with RuntimeError (test_server.py:" in caplog.text
    printed = capsys.readouterr()
    assert not any("stupid" in told for told in (answer.text, caplog.text, printed.err, printed.out))


def test_half_a_surrogate_pair_in_the_models_name_is_no_failure(url: str) -> None:
    answer = httpx.post(f"{url}/v1/moderations", content=rb'{"input": "fine", "model": "m\ud800"}')
    assert (answer.status_code, answer.json()["model"]) == (200, "m\ufffd")


async def test_unsupported_language_as_an_error() -> None:
    transport = httpx.ASGITransport(create_app(EmbeddedModerator(unsupported_language="error")))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        russian = "Сегодня хорошая погода, и мы идём гулять."
        answer = await http.post("/v1/moderations", json={"input": russian})
    assert answer.status_code == 400
    assert "not in English" in answer.json()["error"]["message"]


async def test_shutdown_closes_the_moderator() -> None:
    moderator = Broken()
    app = create_app(moderator)
    async with app.router.lifespan_context(app):
        assert not moderator.closed
    assert moderator.closed


@pytest.mark.parametrize("options", [{"max_inputs": 0}, {"max_body_bytes": 0}])
def test_limits_below_one_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match="at least 1"):
        create_app(EmbeddedModerator(), **options)  # type: ignore[arg-type]


def test_a_port_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="port"):
        serve(port=70_000)


def test_sigterm_ends_the_server_in_good_order() -> None:
    code = "from tta_middleware.moderation.server import serve; serve(port=0)"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "running on" in line:
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stderr.read()
        process.wait(30)
    assert "Finished server process" in rest
    assert "Traceback" not in rest
