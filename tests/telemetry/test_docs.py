"""docs/telemetry.md against what is told, and the dashboard against the page for Prometheus."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from memory import Memory, ask, guard, read
from opentelemetry import trace
from prometheus_client.parser import text_string_to_metric_families
from staged_server import running, scripted, story

from tta_middleware import Guard, Policy
from tta_middleware.config import Reasoning
from tta_middleware.errors import EngineError, ModerationUnavailableError
from tta_middleware.moderation.breaker import CircuitBreaker, WithBreaker
from tta_middleware.observing import observe_everywhere
from tta_middleware.server import ServerSettings
from tta_middleware.telemetry import FORMAT_VERSION, instrument, uninstrument
from tta_middleware.telemetry import format as names
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "telemetry.md").read_text()
DASHBOARD = json.loads((DOCS / "grafana" / "tta-middleware.json").read_text())
SPANS = {"chat": names.ANSWER, "moderate": names.MODERATION, "repair": names.WAVE, "POST": names.REQUEST}


def section(title: str) -> str:
    return PAGE.partition(f"### {title}\n")[2].partition("\n##")[0]


@pytest.mark.parametrize(
    ("title", "attributes"),
    [
        ("Span `chat {model}`", names.ANSWER),
        ("Span `moderate {moderator}`", names.MODERATION),
        ("Span `repair wave`", names.WAVE),
        (f"Event `{names.EVALUATION_EVENT}`", names.EVALUATION),
        ("Span `{method} {route}`", names.REQUEST),
    ],
)
def test_the_page_lists_the_attributes(title: str, attributes: Mapping[str, str]) -> None:
    rows = [line for line in section(title).splitlines() if line.startswith("| `")]
    assert rows == [f"| `{name}` | {meaning} |" for name, meaning in attributes.items()]


def test_the_page_lists_the_metrics_and_the_version() -> None:
    rows = [line for line in section("Metrics").splitlines() if line.startswith("| `")]
    assert rows == [
        f"| `{name}` | `{names.prometheus_name(name)}` | {about.kind}, `{about.unit}` | {about.about} | "
        + ", ".join(f"`{one}`" for one in about.attributes)
        + " |"
        for name, about in names.METRICS.items()
    ]
    assert f"**{FORMAT_VERSION}**" in PAGE


def test_the_snippets_are_valid() -> None:
    [program] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    try:
        exec(program, {})
    finally:
        uninstrument()
    [settings] = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    assert ServerSettings(**tomllib.loads(settings)).telemetry is not None


def unlike(call: ScriptedCall) -> str:
    if "broken" in call.text:
        raise EngineError("broken")
    return story(call)


@contextmanager
def everything(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Memory, str]]:
    """Spans of all kinds of answers, and the page of a server that gave them."""
    memory = Memory()
    monkeypatch.setattr(trace, "get_tracer", lambda *about: memory.tracers.get_tracer(*about[:2]))
    moderator = WithBreaker(ScriptedModerator(score=flagging("forbidden")), CircuitBreaker())
    telemetry = {"metrics_open": True, "capture_content": True}
    with running(scripted(unlike, method="noise", moderator=moderator), telemetry=telemetry) as served:
        for text in ("roses", "late", "attack", "broken"):
            for stream in (False, True):
                body = {"model": "roses", "messages": [{"role": "user", "content": text}], "stream": stream}
                httpx.post(f"{served.url}/v1/chat/completions", json=body)
        page = httpx.get(f"{served.url}/metrics").text
    yield memory, page


def thoughtful(call: ScriptedCall) -> str:
    return "A walk." if "</think>" in call.prefix else "<think>\nThey ask about a town.\n</think>\n\nA walk."


async def dropped_and_failed(memory: Memory) -> None:
    """What a server gives less easily: checks and waves that are cancelled, or fail."""
    before = observe_everywhere(None)
    instrument(tracer_provider=memory.tracers, meter_provider=memory.meters)
    try:
        for most in range(1, 8):
            await read(guard().stream(ask("late")), most)
        away: Any = [None, None, None, ModerationUnavailableError("away", cause="timeout")]
        for number in range(8):
            failing = ScriptedModerator(score=flagging("forbidden"), failures=[None] * number + away)
            await guard(failing).answer(ask("late"))
        await guard(policy=Policy(mode="observe")).answer(ask("attack"))
        thinking = ScriptedEngine(thoughtful, thinking=True, template=("enable_thinking",))
        await Guard(thinking, ScriptedModerator(), reasoning=Reasoning(mode="show")).answer(ask())
    finally:
        observe_everywhere(before)


@pytest.mark.slow
async def test_what_is_told_is_what_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, set[str]] = {kind: set() for kind in SPANS}
    events: set[str] = set()
    with everything(monkeypatch) as (memory, _):
        await dropped_and_failed(memory)
    for span in memory.spans:
        told[span.name.split(" ", maxsplit=1)[0]] |= set(span.attributes or {})
        events |= {name for event in span.events for name in event.attributes or {}}
        assert {event.name for event in span.events} <= {names.EVALUATION_EVENT}
    assert {kind: set(listed) - told[kind] for kind, listed in SPANS.items()} == {
        "chat": set(),
        "moderate": set(),
        "repair": {names.ERROR},  # an engine that fails in a wave
        "POST": set(),
    }
    assert [name for kind, listed in SPANS.items() for name in told[kind] - set(listed)] == []
    assert events == set(names.EVALUATION)


def asked_for(expression: str) -> tuple[set[str], set[str]]:
    """The metrics and the labels of an expression in Prometheus' language."""
    bare = re.sub(r"by \([^)]*\)|\{[^}]*\}", "", expression)
    metrics = set(re.findall(r"\b(?:tta|gen_ai|http)_\w+", bare))
    inside = re.findall(r"\{([^}]*)\}", expression)
    labels = {label for text in inside for label in re.findall(r"(\w+)[!=]?[=~]", text)}
    grouped = {label.strip() for text in re.findall(r"by \(([^)]*)\)", expression) for label in text.split(",")}
    return metrics, (labels | grouped) - {"le"}


@pytest.mark.slow
def test_the_dashboard_asks_for_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with everything(monkeypatch) as (_, page):
        families = list(text_string_to_metric_families(page))
    there = {sample.name for family in families for sample in family.samples}
    labels = {label for family in families for sample in family.samples for label in sample.labels}
    expressions = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    assert len(expressions) > 15
    metrics: set[str] = set()
    for expression in expressions:
        wanted, by = asked_for(expression)
        assert wanted, expression
        assert wanted <= there, expression
        assert by <= labels, expression
        metrics |= wanted
    # A dashboard leaves nothing out: every metric is somewhere in it.
    exposed = {names.prometheus_name(name) for name in names.METRICS}
    assert {name for name in exposed if not any(one.startswith(name) for one in metrics)} == set()
    assert exposed <= {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in there}
    variables = [one["query"]["query"] for one in DASHBOARD["templating"]["list"] if one["type"] == "query"]
    assert all(re.fullmatch(r"label_values\((\w+), (\w+)\)", query) for query in variables)
    assert {re.findall(r", (\w+)", query)[0] for query in variables} <= labels


def test_every_name_has_one_meaning_and_labels_are_listed() -> None:
    listed = {*names.ANSWER, *names.MODERATION, *names.WAVE, *names.EVALUATION, *names.REQUEST}
    labels = {label for metric in names.METRICS.values() for label in metric.attributes}
    assert labels - listed == {names.TOKEN_TYPE, names.GATE}
    assert "gate" in PAGE
