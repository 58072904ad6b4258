"""Every public way of having a text checked is told, or the page says why not; a new one that is forgotten fails."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from langchain_core.runnables import RunnableGenerator, RunnableLambda
from memory import Memory, ask, guard, read
from staged_server import CALM, running, scripted
from staged_upstream import saying, upstream
from starlette.applications import Starlette
from test_agents import agent, guarded

import tta_middleware
from tta_middleware import Guard
from tta_middleware.cli import main
from tta_middleware.guard.moderated import moderated
from tta_middleware.moderation.server import create_app as moderation_app
from tta_middleware.server import create_app
from tta_middleware.testing.loopback import on_loopback
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging

Way = Callable[[], Awaitable[object]]

PACKAGE = Path(tta_middleware.__file__).parent
PAGE = (PACKAGE.parent / "docs" / "telemetry.md").read_text()
ASKED = "Tell me of roses, secretword"
CHAT = {"model": "roses", "messages": [{"role": "user", "content": ASKED}]}
INLINE = {"moderation": {"model": "any", "policy": {"input": {"mode": "block"}}}}


def judge() -> ScriptedModerator:
    return ScriptedModerator(score=flagging("forbidden"))


async def words(text: str = CALM) -> AsyncIterator[str]:
    for word in text.split(" "):
        yield f"{word} "


async def stream_of_another_model() -> None:
    async with aclosing(moderated(words(), judge(), prompt=ASKED)) as pieces:
        assert [piece async for piece in pieces]


async def in_a_chain() -> None:
    async def checked(chunks: AsyncIterator[str]) -> AsyncIterator[str]:
        async for piece in moderated(chunks, judge()):
            yield piece

    async for _ in (RunnableLambda(lambda asked: f"{CALM} {asked}") | RunnableGenerator(checked)).astream(ASKED):
        pass


def posting(path: str, **body: Any) -> Way:
    """A request to a server of one model of ours."""

    async def post() -> None:
        with running(scripted()) as served:
            await anyio.to_thread.run_sync(lambda: httpx.post(f"{served.url}{path}", json=body).raise_for_status())

    return post


async def to_an_upstream() -> None:
    with upstream(saying()) as behind, running({"roses": behind.model(prompt_check="user")}) as served:
        url = f"{served.url}/v1/chat/completions"
        await anyio.to_thread.run_sync(lambda: httpx.post(url, json=CHAT).raise_for_status())


async def to_the_moderation_server() -> None:
    with on_loopback(moderation_app(judge())) as served:
        url = f"{served.url}/v1/moderations"
        await anyio.to_thread.run_sync(lambda: httpx.post(url, json={"input": ASKED}).raise_for_status())


GUARD: dict[str, Way] = {
    "answer": lambda: guard(prompt_check="user").answer(ask(ASKED)),
    "report": lambda: guard(prompt_check="user").report(ask(ASKED)),
    "stream": lambda: read(guard(prompt_check="user").stream(ask(ASKED))),
}
"""What a guard's users call."""

POSTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/responses": {"model": "roses", "input": ASKED},
    "/v1/moderations": {"input": ASKED},
    "/v1/checks": {"text": ASKED},
}
"""The server's endpoints that take text."""

WAYS: dict[str, tuple[Way, set[str]]] = {
    **{f"Guard.{name}": (way, {"prompt", "output"}) for name, way in GUARD.items()},
    "TTAChatModel": (lambda: scripted().ainvoke(ASKED), {"output"}),
    "GuardedChatModel, whole": (lambda: guarded().ainvoke(ASKED), {"output"}),
    "GuardedChatModel, streamed": (lambda: anyio.to_thread.run_sync(list, guarded().stream(ASKED)), {"output"}),
    "TTAMiddleware": (
        lambda: agent().ainvoke({"messages": [("user", ASKED)]}),
        {"prompt", "output", "tool_result"},
    ),
    "moderated": (stream_of_another_model, {"output"}),
    "moderated in a chain": (in_a_chain, {"output"}),
    "inline moderation": (posting("/v1/chat/completions", **CHAT, **INLINE), {"prompt", "output"}),
    "an upstream": (to_an_upstream, {"prompt", "output"}),
    "moderation.server": (to_the_moderation_server, {"text"}),
    **{
        f"POST {path}": (posting(path, **body), {"text"} if "moderations" in path else {"output"})
        for path, body in POSTS.items()
    },
}
"""Each way, and the stages that telemetry is told of."""

TOLD_IN = {
    "guard/context.py": "Guard",
    "guard/ledger.py": "GuardedChatModel, TTAMiddleware, an upstream",
    "guard/moderated.py": "moderated",
    "moderation/server.py": "moderation.server, POST /v1/moderations",
    "server/checks.py": "POST /v1/checks",
    "server/inline_moderation.py": "inline moderation",
}
"""The modules in which a moderator is asked, and telemetry is told, with the ways that lead there."""

NOT_TOLD_IN = {
    "cli/checks.py": "`tta doctor`",
    "cli/judging_check.py": "`tta doctor`",
    "cli/moderate_job.py": "`tta moderate`",
    "evaluation/comparators/workbench.py": "`tta_middleware.evaluation`",
    "evaluation/judges.py": "`tta_middleware.evaluation`",
}
"""The modules in which one is asked and nobody is told; the page says so in these words."""

WRAPPERS = ("moderation/", "policy/", "testing/", "_moved/")
"""Moderators made of others, and what all of them are asked through."""


@pytest.mark.parametrize("name", WAYS)
async def test_a_way_is_told_with_its_verdicts_and_without_a_text(memory: Memory, name: str) -> None:
    way, stages = WAYS[name]
    await way()
    about = [dict(span.attributes or {}) for span in memory.named("moderate ")]
    assert {one["tta.moderation.stage"] for one in about} == stages
    assert all("tta.score" in one for one in about)
    points = memory.points("tta.moderation.duration")
    assert {(point.attributes or {})["tta.moderation.stage"] for point in points} == stages
    for text in ("secretword", "roses early", "harbour town"):
        assert text not in memory.everything()


def test_a_batch_is_told(memory: Memory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    instrumented: list[bool] = []
    monkeypatch.setattr("tta_middleware.telemetry.instrument", lambda: instrumented.append(True))
    monkeypatch.setattr("tta_middleware.assembly.resolve_engine", lambda *_, **__: scripted().model)
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"prompt": ASKED}) + "\n")
    for options in ([], ["--telemetry"]):
        assert main(["batch", str(source), str(tmp_path / f"out{len(options)}.jsonl"), *options]) == 0
    assert instrumented == [True]
    assert len(memory.named("chat")) == 2
    assert "secretword" not in memory.everything()


def test_no_method_of_a_guard_is_forgotten() -> None:
    public = {name for name, one in vars(Guard).items() if inspect.isfunction(one) and not name.startswith("_")}
    assert public == set(GUARD)


def test_no_endpoint_is_forgotten() -> None:
    app: Starlette = create_app({"roses": scripted()})
    taking: set[str] = {route.path for route in app.routes if "POST" in route.methods}  # type: ignore[attr-defined]
    assert taking == set(POSTS)


def test_no_module_that_asks_a_moderator_is_forgotten() -> None:
    asking = re.compile(r"\bverdicts?_on\(|partial\(verdicts_on\b|\bchecking_alone\(")
    places = {str(path.relative_to(PACKAGE)): path for path in PACKAGE.rglob("*.py")}
    integrations = PACKAGE.parent / "integrations"
    places |= {str(path.relative_to(integrations)): path for path in integrations.rglob("*.py")}
    found = {name for name, path in places.items() if asking.search(path.read_text(encoding="utf-8"))}
    found = {name for name in found if not name.startswith(WRAPPERS) or name in TOLD_IN}
    assert found - {"observing.py", "telemetry/otel.py"} == {*TOLD_IN, *NOT_TOLD_IN}


def test_the_page_says_what_is_not_told_and_why() -> None:
    section = PAGE.partition("## What is not told\n")[2].partition("\n## ")[0]
    for words_of_it in NOT_TOLD_IN.values():
        assert words_of_it in section
