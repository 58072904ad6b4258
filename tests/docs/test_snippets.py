"""Every snippet of the documentation runs, with scripted parts in place of models and services.

Pages with a test of their own are in ``ELSEWHERE``; all others are run here, so a new page cannot be forgotten.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tta_middleware import assembly
from tta_middleware.server.settings import read_server_file
from tta_middleware.testing.scripted_engine import ScriptedEngine

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "serve"))
from staged_server import CALM, running, scripted  # noqa: E402

ELSEWHERE = {
    "agents.md": "tests/integrations/agents/test_docs.py",
    "moderation.md": "tests/moderation/test_docs.py",
    "profiles.md": "tests/profiles/test_docs.py",
    "reasoning.md": "tests/langchain/test_reasoning_doc.py",
    "server.md": "tests/serve/test_docs.py",
    "testing.md": "tests/testing/test_docs.py",
    "tools.md": "tests/langchain/test_tools_doc.py",
}
NEEDS_ANOTHER_ENVIRONMENT = {"scaling.md": "vLLM (make test-vllm)", "telemetry.md": "its telemetry is global"}
HERE = ("batch.md", "how-to.md", "integrations.md", "migration.md", "streaming.md")


def blocks(page: str, language: str = "python") -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_no_page_is_forgotten() -> None:
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    with_code = {page for page in pages if blocks(page)}
    assert {*ELSEWHERE, *NEEDS_ANOTHER_ENVIRONMENT, *HERE} >= with_code
    assert all((ROOT / test).exists() for test in ELSEWHERE.values())


@pytest.mark.parametrize("page", NEEDS_ANOTHER_ENVIRONMENT)
def test_what_cannot_run_here_compiles_and_its_names_exist(page: str) -> None:
    for block in blocks(page):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("tta_middleware"):
                module = __import__(str(node.module), fromlist=["x"])
                assert all(hasattr(module, alias.name) for alias in node.names)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a page's reader has before them; models by name follow a script."""
    from langchain_core.runnables import ConfigurableField

    from tta_middleware import Budget, Policy, TTAChatModel

    monkeypatch.setattr(assembly, "resolve_engine", lambda *_, **__: ScriptedEngine(CALM))
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    model = scripted()
    about = {"model": model, "chain": model, "question": "Roses?", "prompts": ["Roses?", "Bees?"]}
    return about | {
        "Budget": Budget, "ConfigurableField": ConfigurableField, "Policy": Policy, "TTAChatModel": TTAChatModel
    }  # fmt: skip


async def run(page: str, names: dict[str, Any]) -> dict[str, Any]:
    for block in blocks(page):
        code = compile(block, page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        if inspect.CO_COROUTINE & code.co_flags:
            await eval(code, names)
        else:
            exec(code, names)
    return names


@pytest.mark.parametrize("page", ["batch.md", "migration.md"])
async def test_a_page_runs(page: str, names: dict[str, Any]) -> None:
    await run(page, names)


def test_the_how_to_runs(names: dict[str, Any]) -> None:
    for block in blocks("how-to.md"):
        exec(block, names)


async def test_streaming_runs(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    await run("streaming.md", names)
    assert capsys.readouterr().out == CALM
    assert "".join([piece async for piece in names["guarded"].astream(CALM)]) == CALM


async def test_integrations_run(names: dict[str, Any]) -> None:
    await run("integrations.md", names)
    assert await names["chain"].ainvoke({"question": "Roses?"}) == CALM
    config = {"configurable": {"thread_id": "one"}}
    state = await names["app"].ainvoke({"messages": [("user", "Roses?")]}, config)
    assert state["messages"][-1].text == CALM
    with running({"small": scripted()}) as served:
        assert "".join(names["stream"](f"{served.url}/v1")) == CALM
        assert [names["moderate"](f"{served.url}/v1", text) for text in ("roses", "forbidden")] == [False, True]


@pytest.mark.parametrize("page", ["deployment.md", "migration.md"])
def test_settings_files_load(page: str, tmp_path: Path) -> None:
    [text] = blocks(page, "toml")
    file = tmp_path / "server.toml"
    file.write_text(text)
    assert read_server_file(file)[1]
