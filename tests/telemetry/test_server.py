"""Telemetry of a server: spans from the client's on, the page for Prometheus, and who may read it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import httpx
import pytest
from anyio.abc import TaskGroup
from memory import Memory
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan
from prometheus_client.parser import text_string_to_metric_families
from staged_server import BAD, CALM, CHAT_SCOPE, Reader, Served, running, scripted
from staged_upstream import saying, upstream
from starlette.applications import Starlette
from starlette.routing import Mount

from tta_middleware import Policy
from tta_middleware.errors import EngineError
from tta_middleware.server import ServerSettings, create_app
from tta_middleware.telemetry import TelemetrySettings
from tta_middleware.telemetry import format as names
from tta_middleware.testing.scripted_engine import ScriptedCall
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    """What goes to OpenTelemetry's global providers, which a process may set once only."""
    memory = Memory()
    monkeypatch.setattr(trace, "get_tracer", lambda *about: memory.tracers.get_tracer(*about[:2]))
    yield memory
    memory.check_ends()


def asked(served: Served, text: str = "roses", **more: Any) -> str:
    client = served.client(more.pop("key", "none"))
    messages: Any = [{"role": "user", "content": text}]
    answer = client.chat.completions.create(model="roses", messages=messages, **more)
    if more.get("stream"):
        return "".join(chunk.choices[0].delta.content or "" for chunk in answer if chunk.choices)
    return str(answer.choices[0].message.content)


def samples(served: Served, **request: Any) -> dict[str, list[tuple[dict[str, str], float]]]:
    page = httpx.get(f"{served.url}/metrics", **request)
    assert page.headers["content-type"].startswith("text/plain")
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(page.raise_for_status().text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_s_span_lies_in_the_request_s_and_that_in_the_client_s(told: Memory, stream: bool) -> None:
    with running(telemetry={}) as served:
        assert asked(served, stream=stream, extra_headers={"traceparent": PARENT}) == CALM
    [request], [answer] = told.named("POST "), told.named("chat ")
    assert request.name == "POST /v1/chat/completions"
    assert answer.name == "chat roses"
    assert request.parent is not None
    assert answer.parent is not None
    assert f"{request.parent.span_id:016x}" == "b7ad6b7169203331"
    assert answer.parent.span_id == request.context.span_id
    assert {f"{span.context.trace_id:032x}" for span in told.spans} == {"0af7651916cd43dd8448eb211c80319c"}
    about = dict(request.attributes or {})
    assert about["http.route"] == "/v1/chat/completions"
    assert about["http.response.status_code"] == 200
    assert "error.type" not in about
    assert (answer.attributes or {})["tta.policy"] == "default"


def test_parallel_requests_keep_their_traces_apart(told: Memory) -> None:
    def one(number: int) -> None:
        parent = f"00-{number + 1:032x}-b7ad6b7169203331-01"
        asked(served, ("roses", "late", "attack")[number % 3], stream=True, extra_headers={"traceparent": parent})

    with running(telemetry={}) as served:
        threads = [threading.Thread(target=one, args=(number,)) for number in range(6)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    for number in range(6):
        mine = [span for span in told.spans if span.context.trace_id == number + 1]
        assert sum(span.name.startswith("chat") for span in mine) == 1
        assert sum(span.name.startswith("POST") for span in mine) == 1


def test_errors_have_their_status_and_no_text(told: Memory) -> None:
    def broken(call: ScriptedCall) -> str:
        raise EngineError("secretword")

    with running(scripted(broken), telemetry={}) as served:
        body = {"model": "roses", "messages": [{"role": "user", "content": "secretword"}]}
        assert httpx.post(f"{served.url}/v1/chat/completions", json=body).status_code == 500
        assert httpx.post(f"{served.url}/v1/chat/completions", json={"model": "secretword"}).status_code == 400
        durations = samples(served)["http_server_request_duration_seconds_count"]
    failed, refused = told.named("POST ")
    assert (failed.attributes or {})["error.type"] == "500"
    assert "error.type" not in (refused.attributes or {})
    assert {labels["http_response_status_code"] for labels, _ in durations} == {"500", "400"}
    assert "secretword" not in told.everything()


async def broken_off(told: Memory, end: Callable[[Reader, TaskGroup], object]) -> tuple[ReadableSpan, ReadableSpan]:
    """The spans of a request and of its answer, of which two pieces had left when ``end`` was called."""
    app = create_app({"roses": scripted()}, ServerSettings(telemetry=TelemetrySettings()))
    reader = Reader(2)
    async with anyio.create_task_group() as group:
        group.start_soon(app, dict(CHAT_SCOPE), reader.receive, reader.send)
        while len(reader.sent) < 3:
            await anyio.lowlevel.checkpoint()
        end(reader, group)
    for _ in range(500):  # LangChain leaves its inner generator to the event loop's hooks
        await anyio.lowlevel.checkpoint()
    [request], [answer] = told.named("POST "), told.named("chat ")
    return request, answer


async def test_a_request_that_the_server_breaks_off_is_no_success(told: Memory) -> None:
    request, answer = await broken_off(told, lambda _, group: group.cancel_scope.cancel())
    about = request.attributes or {}
    assert (about["http.response.status_code"], about["error.type"]) == (200, "cancelled")
    assert set(about) <= set(names.REQUEST)
    assert (answer.attributes or {})["error.type"] == "cancelled"


async def test_a_client_that_leaves_ends_both_spans(told: Memory) -> None:
    request, answer = await broken_off(told, lambda reader, _: reader.leaves.set())
    assert (request.attributes or {})["error.type"] == "disconnected"
    assert (answer.attributes or {})["error.type"] == "cancelled"


def test_metrics_take_a_key_where_others_do(told: Memory) -> None:
    with running(telemetry={}, keys="sk-one") as served:
        assert httpx.get(f"{served.url}/metrics").status_code == 401
        assert samples(served, headers={"authorization": "Bearer sk-one"})
    with running(telemetry={"metrics_open": True}, keys="sk-one") as served:
        assert samples(served)
    with running() as served:
        assert httpx.get(f"{served.url}/metrics").status_code == 404


def test_metrics_are_told_apart_by_model_policy_and_outcome(told: Memory) -> None:
    with running({"roses": scripted(method="noise"), "other": scripted()}, telemetry={}) as served:
        for text in ("roses", "late", "attack"):
            asked(served, text, stream=text == "late")
        found = samples(served)
    answers = found["tta_answers_total"]
    wanted = ("gen_ai_request_model", "tta_policy", "tta_outcome")
    assert {tuple(labels[name] for name in wanted): value for labels, value in answers} == {
        ("roses", "default", "clean"): 1,
        ("roses", "default", "neutralised"): 1,
        ("roses", "default", "blocked"): 1,
    }
    assert {labels["tta_gate"] for labels, _ in found["tta_server_waiting"]} == {"chat", "checks"}


def test_names_of_models_that_are_not_served_make_no_labels(told: Memory) -> None:
    with running(telemetry={}) as served:
        for number in range(5):
            body = {"model": f"guess-{number}", "messages": [{"role": "user", "content": "roses"}]}
            httpx.post(f"{served.url}/v1/chat/completions", json=body)
            httpx.get(f"{served.url}/v1/models/guess-{number}")
        page = httpx.get(f"{served.url}/metrics").text
    assert "guess" not in page


def test_the_queue_is_a_gauge(told: Memory) -> None:
    enter, leave = threading.Semaphore(0), threading.Event()

    async def gate() -> None:
        enter.release()
        await anyio.to_thread.run_sync(leave.wait)

    moderator = ScriptedModerator(score=flagging("forbidden"), gate=gate)
    with running(scripted(moderator=moderator), telemetry={}, limits={"concurrency": 1, "queue": 4}) as served:
        threads = [threading.Thread(target=asked, args=(served,)) for _ in range(3)]
        [thread.start() for thread in threads]
        enter.acquire()
        try:
            waiting: float = 0
            while waiting < 2:  # requests come in their own time
                gauges = samples(served)
                [waiting] = [value for labels, value in gauges["tta_server_waiting"] if labels["tta_gate"] == "chat"]
            [active] = [value for labels, value in gauges["tta_server_active"] if labels["tta_gate"] == "chat"]
        finally:
            leave.set()
            [thread.join() for thread in threads]
    assert (active, waiting) == (1, 2)


async def test_mounted_in_an_application_that_has_a_span_it_lies_in_that(told: Memory) -> None:
    app = create_app({"roses": scripted()}, ServerSettings(telemetry=TelemetrySettings()))
    site = Starlette(routes=[Mount("/ai", app)], lifespan=lambda _: app.router.lifespan_context(app))
    tracer = told.tracers.get_tracer("site")
    async with site.router.lifespan_context(site):
        with tracer.start_as_current_span("site") as span:
            transport = httpx.ASGITransport(site)
            async with httpx.AsyncClient(transport=transport, base_url="http://site/ai") as client:
                body = {"model": "roses", "messages": [{"role": "user", "content": "roses"}]}
                answer = await client.post("/v1/chat/completions", json=body, headers={"traceparent": PARENT})
    assert answer.status_code == 200
    [request] = told.named("POST ")
    assert request.parent is not None
    assert request.parent.span_id == span.get_span_context().span_id


@pytest.mark.parametrize("stream", [False, True])
def test_an_upstream_s_answer_is_told_like_one_of_ours(told: Memory, stream: bool) -> None:
    with upstream(saying(BAD)) as behind, running({"roses": behind.model()}, telemetry={}) as served:
        asked(served, stream=stream)
        found = samples(served)
    [answer] = told.named("chat ")
    about = dict(answer.attributes or {})
    checks = [span for span in told.named("moderate ") if span.parent and span.parent.span_id == answer.context.span_id]
    assert answer.name == "chat roses"
    assert about["gen_ai.provider.name"] == "openai"
    assert about["tta.outcome"] == "blocked"
    assert about["gen_ai.response.finish_reasons"] == ("content_filter",)
    assert about["gen_ai.request.stream"] is stream
    assert len(checks) == about["tta.moderation_calls"] > 0
    ends = [(event.attributes or {})["tta.window.end"] for event in answer.events]
    assert len(set(ends)) == len(ends) == len(checks)
    assert "gen_ai.request.temperature" not in about
    assert "error.type" not in about
    [(labels, count)] = found["tta_answers_flagged_total"]
    assert (labels["tta_moderation_stage"], labels["tta_outcome"], count) == ("output", "blocked", 1)


def test_an_upstream_that_is_handed_over_has_the_other_s_answer_as_its_child(told: Memory) -> None:
    with upstream(saying(BAD)) as behind:
        local = scripted()
        models = {"roses": behind.model(hand_over="ours", stand_in=local), "ours": local}
        with running(models, telemetry={}) as served:
            asked(served)
    outer, inner = sorted(told.named("chat "), key=lambda span: span.start_time or 0)
    assert inner.parent is not None
    assert inner.parent.span_id == outer.context.span_id
    assert [(span.attributes or {})["gen_ai.provider.name"] for span in (outer, inner)] == ["openai", "tta_middleware"]


def test_a_policy_that_observes_is_told_apart(told: Memory) -> None:
    with running(scripted(policy=Policy(mode="observe")), telemetry={}) as served:
        assert "forbidden" in asked(served, "attack")
        found = samples(served)
    [answer] = told.named("chat ")
    about = dict(answer.attributes or {})
    assert (about["tta.mode"], about["tta.outcome"]) == ("observe", "clean")
    assert about["tta.observed"] == ("output: illicit",)
    labels = {(event.attributes or {})["gen_ai.evaluation.score.label"] for event in answer.events}
    assert "observed" in labels
    [(labels_of, count)] = found["tta_answers_flagged_total"]
    assert (labels_of["tta_mode"], labels_of["tta_outcome"], count) == ("observe", "clean", 1)


@pytest.mark.parametrize("stream", [False, True])
def test_scores_that_a_client_asked_for_are_told_beside_the_answer(told: Memory, stream: bool) -> None:
    with running(telemetry={}) as served:
        asked(served, stream=stream, extra_body={"moderation": {"model": "any"}})
    [request], [answer] = told.named("POST "), told.named("chat ")
    beside = [
        span for span in told.named("moderate ") if span.parent and span.parent.span_id == request.context.span_id
    ]
    assert [(span.attributes or {})["tta.moderation.stage"] for span in beside] == ["output", "prompt"]
    inside = len(told.named("moderate ")) - len(beside)
    assert (answer.attributes or {})["tta.moderation_calls"] == inside


def test_checks_and_moderations_tell_how_long_their_moderator_took(told: Memory) -> None:
    with running(telemetry={"metrics_open": True}) as served:
        with served.client() as api:
            assert api.moderations.create(input=["roses", "a forbidden one"]).results[1].flagged
        check = {"text": "a forbidden secretword", "stage": "prompt"}
        assert httpx.post(f"{served.url}/v1/checks", json=check).json()["flagged"]
        httpx.post(f"{served.url}/v1/moderations", json={"input": 3})
        counts = samples(served)["tta_moderation_duration_seconds_count"]
    assert {labels["tta_moderation_stage"]: count for labels, count in counts} == {"text": 1, "prompt": 1}
    checks = {span.name: span for span in told.named("moderate ")}
    requests = {span.context.span_id: span for span in told.named("POST ")}
    assert len(told.named("moderate ")) == 2
    assert all(span.parent and span.parent.span_id in requests for span in checks.values())
    events = [event for span in requests.values() for event in span.events]
    labels = sorted(str((event.attributes or {})["gen_ai.evaluation.score.label"]) for event in events)
    assert labels == ["flagged", "flagged", "passed"]
    assert "secretword" not in told.everything()
