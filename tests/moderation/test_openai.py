"""The real openai client against a loopback server."""

import asyncio
import gc
import json
import logging
import pickle
import subprocess
import sys
import traceback

import anyio
import anyio.lowlevel
import pytest

from tta_middleware.errors import (
    ConfigurationError,
    InvalidVerdictError,
    ModerationError,
    ModerationRejectedError,
    ModerationUnavailableError,
)
from tta_middleware.moderation.openai import OpenAIModerator
from tta_middleware.moderation.request_size import BatchLimits
from tta_middleware.moderation.retry import RetryPolicy
from tta_middleware.moderation.transport import QuietText
from tta_middleware.policy.verdicts import verdicts_on
from tta_middleware.protocols import Moderator
from tta_middleware.testing.fault_server import FaultServer, moderations
from tta_middleware.testing.faults import UNAVAILABLE, Fault, always, script
from tta_middleware.types import CATEGORIES

SECRET_TEXT = "the quick brown fox 7741"


async def test_a_list_of_texts_is_one_request_and_verdicts_keep_its_order(server, moderator):
    verdicts = await moderator.moderate(["one", "flagme two", "three"])
    assert [verdict.flagged for verdict in verdicts] == [False, True, False]
    assert verdicts[1].top_category == "violence"
    assert set(verdicts[0].scores) == set(CATEGORIES)
    assert [request.texts for request in server.requests] == [["one", "flagme two", "three"]]
    assert server.requests[0].headers["authorization"] == "Bearer sk-test"


async def test_an_empty_list_needs_no_request(server, moderator):
    assert await moderator.moderate([]) == []
    assert server.requests == []


async def test_blank_texts_are_not_sent_and_keep_their_place(server, moderator):
    verdicts = await moderator.moderate(["", "flagme", " \n"])
    assert [verdict.score for verdict in verdicts] == [0.0, 0.9, 0.0]
    assert server.requests[0].texts == ["flagme"]


async def test_long_lists_are_sent_as_several_requests(server):
    limits = BatchLimits(max_texts=3, max_characters=20)
    async with OpenAIModerator(base_url=server.base_url, api_key="k", limits=limits) as moderator:
        texts = ["a", "b", "c", "flagme " + "d" * 30, "e" * 15, "f" * 15]
        verdicts = await moderator.moderate(texts)
    assert [verdict.flagged for verdict in verdicts] == [False, False, False, True, False, False]
    assert sorted(len(request.texts) for request in server.requests) == [1, 1, 1, 3]


async def test_half_a_surrogate_pair_does_not_break_the_request(server, moderator):
    assert len(await moderator.moderate(["flagme \ud83d"])) == 1
    assert server.requests[0].texts == ["flagme \ufffd"]


@pytest.mark.parametrize("kind", ["truncated", "html", "nan", "missing_category", "wrong_length"])
async def test_an_unusable_answer_is_a_named_error_and_is_not_asked_for_again(server, moderator, kind):
    server.plan = always(Fault(kind))
    with pytest.raises(InvalidVerdictError):
        await moderator.moderate(["one", "two"])
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "result",
    [
        {"flagged": False},
        {"flagged": False, "category_scores": None},
        {"flagged": False, "category_scores": dict.fromkeys(CATEGORIES, None)},
        {"flagged": False, "category_scores": dict.fromkeys(CATEGORIES, True)},
        {"flagged": False, "category_scores": dict.fromkeys(CATEGORIES, "0.1")},
        {"flagged": False, "category_scores": dict.fromkeys(CATEGORIES, 1.5)},
        {"flagged": False, "category_scores": dict.fromkeys(CATEGORIES, 10**400)},
        {"flagged": "no", "category_scores": dict.fromkeys(CATEGORIES, 0.1)},
        {"category_scores": dict.fromkeys(CATEGORIES, 0.1)},
        {"flagged": False, "category_scores": {name.replace("-", "_"): 0.1 for name in CATEGORIES}},
        None,
        [],
    ],
)
async def test_malformed_results_never_pass(server, moderator, result):
    server.routes["/v1/moderations"] = lambda _body: {"model": "m", "results": [result]}
    with pytest.raises(InvalidVerdictError):
        await moderator.moderate(["one"])


@pytest.mark.parametrize("payload", [[], "safe", None, 3, {}, {"results": {}}, {"results": None}])
async def test_answers_of_another_shape_never_pass(server, moderator, payload):
    server.routes["/v1/moderations"] = lambda _body: payload
    with pytest.raises(InvalidVerdictError):
        await moderator.moderate(["one"])


async def test_a_server_with_fewer_categories_is_served_when_told_so(server):
    few = ("hate", "violence")
    server.routes["/v1/moderations"] = moderations(lambda _text: dict.fromkeys(few, 0.2))
    async with OpenAIModerator(base_url=server.base_url, api_key="k", categories=few) as moderator:
        assert (await moderator.moderate(["x"]))[0].scores == {"hate": 0.2, "violence": 0.2}


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 529])
async def test_passing_failures_are_retried(server, moderator, status):
    server.plan = script(Fault("status", status=status), Fault("reset"), Fault("status", status=status))
    assert [verdict.flagged for verdict in await moderator.moderate(["flagme"])] == [True]
    assert len(server.requests) == 4


@pytest.mark.parametrize(
    ("status", "advice"),
    [(400, "length"), (401, "OPENAI_API_KEY"), (403, "permissions"), (404, "base_url"), (418, "base_url")],
)
async def test_lasting_failures_are_raised_at_once_with_what_to_do(server, moderator, status, advice):
    server.plan = always(Fault("status", status=status))
    with pytest.raises(ModerationRejectedError, match=advice) as caught:
        await moderator.moderate(["one"])
    assert caught.value.status == status
    assert len(server.requests) == 1


async def test_a_spent_quota_is_not_retried_although_it_is_a_429(server, moderator):
    class Quota(FaultServer):
        def _content(self, request, fault):
            return 429, "application/json", b'{"error": {"code": "insufficient_quota", "message": "x"}}'

    async with Quota() as broke, OpenAIModerator(base_url=broke.base_url, api_key="k") as client:
        with pytest.raises(ModerationRejectedError, match="quota"):
            await client.moderate(["one"])
        assert len(broke.requests) == 1


async def test_retries_end_with_the_policy(server):
    server.plan = always(UNAVAILABLE)
    policy = RetryPolicy(attempts=3, base_delay=0.0)
    async with OpenAIModerator(base_url=server.base_url, api_key="k", retry=policy) as moderator:
        with pytest.raises(ModerationUnavailableError, match="after 3 attempts") as caught:
            await moderator.moderate(["one"])
    assert caught.value.cause == "status"
    assert len(server.requests) == 3


@pytest.mark.parametrize("kind", ["hang", "drip"])
async def test_a_hanging_or_dripping_server_is_a_timeout(server, kind):
    server.plan = always(Fault(kind))
    once = RetryPolicy(attempts=1)
    async with OpenAIModerator(base_url=server.base_url, api_key="k", timeout=0.05, retry=once) as moderator:
        with pytest.raises(ModerationUnavailableError) as caught:
            await moderator.moderate(["one"])
    assert caught.value.cause == "timeout"


async def test_the_callers_deadline_reaches_the_attempt(server, moderator):
    with anyio.fail_after(6.0):
        await moderator.moderate(["one"])
    assert float(server.requests[0].headers["x-stainless-read-timeout"]) <= 6.0


async def test_nobody_listening_is_unavailable():
    policy = RetryPolicy(attempts=2, base_delay=0.0)
    async with OpenAIModerator(base_url="http://127.0.0.1:9/v1", api_key="k", retry=policy) as moderator:
        with pytest.raises(ModerationUnavailableError, match=r"127\.0\.0\.1:9") as caught:
            await moderator.moderate(["one"])
    assert caught.value.cause == "connection"


async def test_a_missing_key_is_told_at_the_first_request_only(monkeypatch, server):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    moderator = OpenAIModerator(base_url=server.base_url)
    with pytest.raises(ConfigurationError, match="set OPENAI_API_KEY"):
        await moderator.moderate(["one"])
    monkeypatch.setenv("OPENAI_API_KEY", "sk-later")
    async with moderator:
        assert len(await moderator.moderate(["one"])) == 1
    assert server.requests[0].headers["authorization"] == "Bearer sk-later"


@pytest.mark.parametrize("arguments", [{"base_url": "api.example"}, {"timeout": 0.0}, {"timeout": float("nan")}])
def test_unusable_settings_are_told_at_construction(arguments):
    with pytest.raises(ConfigurationError):
        OpenAIModerator(**arguments)


def test_what_the_client_may_log_of_a_text_is_its_length():
    body = {"input": [QuietText.of(SECRET_TEXT)]}
    assert SECRET_TEXT not in repr(body)
    assert SECRET_TEXT in json.dumps(body)


def test_neither_import_nor_construction_loads_the_openai_package():
    code = "import sys, tta_middleware.moderation.openai as m; m.OpenAIModerator(); sys.exit('openai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_it_satisfies_the_protocol():
    moderator = OpenAIModerator()
    assert isinstance(moderator, Moderator)
    assert moderator.name == "openai/omni-moderation-latest"
    assert moderator.default_threshold == 0.1


def test_one_moderator_serves_loop_after_loop_without_being_closed():
    with FaultServer() as server:
        moderator = OpenAIModerator(base_url=server.base_url, api_key="k")
        for _ in range(3):
            assert asyncio.run(moderator.moderate(["flagme"]))[0].flagged
        # A socket that outlived its loop would warn here, and warnings are errors.
        gc.collect()
        assert len(server.requests) == 3


def test_one_moderator_serves_loops_of_several_threads_at_once():
    async def ask(index: int) -> list[bool]:
        verdicts = [await moderator.moderate([f"flagme {index} {i}"]) for i in range(5)]
        return [verdict[0].flagged for verdict in verdicts]

    async def main() -> list[list[bool]]:
        return await asyncio.gather(*(asyncio.to_thread(asyncio.run, ask(index)) for index in range(4)))

    with FaultServer() as server:
        moderator = OpenAIModerator(base_url=server.base_url, api_key="k")
        assert asyncio.run(main()) == [[True] * 5] * 4


async def test_aclose_closes_the_sockets_of_other_loops_too(server):
    moderator = OpenAIModerator(base_url=server.base_url, api_key="k")
    other_done = asyncio.Event()
    here = asyncio.get_running_loop()
    elsewhere: dict[str, object] = {}

    async def other() -> None:
        elsewhere["loop"] = asyncio.get_running_loop()
        elsewhere["finish"] = asyncio.Event()
        await moderator.moderate(["one"])
        here.call_soon_threadsafe(other_done.set)
        await elsewhere["finish"].wait()

    thread = asyncio.create_task(asyncio.to_thread(asyncio.run, other()))
    await other_done.wait()
    try:
        await moderator.moderate(["two"])
        await moderator.aclose()
        await moderator.aclose()
        with anyio.fail_after(10.0):
            while server.connections:
                await anyio.lowlevel.checkpoint()
    finally:
        elsewhere["loop"].call_soon_threadsafe(elsewhere["finish"].set)
        await thread


async def test_cancelled_calls_leave_no_task_and_no_socket():
    with FaultServer(always(Fault("hang"))) as server:
        async with OpenAIModerator(base_url=server.base_url, api_key="k") as moderator:
            before = asyncio.all_tasks()
            calls = [asyncio.create_task(moderator.moderate([f"text {i}"])) for i in range(50)]
            while len(server.requests) < 50:
                await anyio.lowlevel.checkpoint()
            for call in calls:
                call.cancel()
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(result, asyncio.CancelledError) for result in results)
            while server.connections:
                await anyio.lowlevel.checkpoint()
            assert asyncio.all_tasks() <= before


@pytest.mark.parametrize(
    "fault", [Fault("status", status=400), Fault("html"), Fault("nan"), Fault("reset"), UNAVAILABLE]
)
async def test_neither_text_nor_key_reaches_logs_or_errors(server, moderator, caplog, fault):
    caplog.set_level(logging.DEBUG)
    server.plan = always(fault)
    with pytest.raises(ModerationError) as caught:
        await moderator.moderate([SECRET_TEXT], prompt=SECRET_TEXT)
    told = "".join(traceback.format_exception(caught.value)) + repr(pickle.loads(pickle.dumps(caught.value)))
    for secret in (SECRET_TEXT, "sk-test"):
        assert secret not in told
        assert secret not in caplog.text
    assert caught.value.__context__ is None


@pytest.mark.parametrize("userinfo", ["alice:sk-gate@", "sk-gate@", "alice:sk%2Dgate@"])
async def test_a_password_in_the_servers_url_is_in_no_error_and_no_log(server, caplog, userinfo):
    caplog.set_level(logging.DEBUG, "tta_middleware")
    host = server.base_url.removeprefix("http://")
    server.plan = always(Fault("status", status=403))
    async with OpenAIModerator(base_url=f"http://{userinfo}{host}", api_key="k") as moderator:
        with pytest.raises(ModerationRejectedError) as caught:
            await verdicts_on(moderator, ["x"])
    for told in (str(caught.value), caplog.text):
        assert "gate@" not in told
        assert "alice" not in told
    assert host.partition("/")[0] in str(caught.value)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_takes_neither_text_nor_key_to_another_server(server, status):
    async with FaultServer() as other:
        server.plan = always(Fault("status", status=status, headers=(("Location", f"{other.base_url}/moderations"),)))
        async with OpenAIModerator(base_url=server.base_url, api_key="sk-test") as moderator:
            with pytest.raises(ModerationRejectedError, match=f"{status}.*base_url"):
                await moderator.moderate([SECRET_TEXT])
        assert other.requests == []
    assert len(server.requests) == 1
