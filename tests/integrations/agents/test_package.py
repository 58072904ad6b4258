"""The integration as a package: what it exports, its types, its sizes."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import tta_langchain_agents

PACKAGE = Path(tta_langchain_agents.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))


def test_what_is_public_is_there() -> None:
    assert tta_langchain_agents.__all__ == ["GuardedChatModel", "TTAMiddleware"]
    assert all(hasattr(tta_langchain_agents, name) for name in tta_langchain_agents.__all__)
    assert (PACKAGE / "py.typed").exists()


def test_importing_it_loads_no_model_library() -> None:
    code = (
        "import sys, tta_langchain_agents; print([m for m in ('torch', 'transformers', 'openai') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_house_rules(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        assert not isinstance(node, ast.Assert)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or node.lineno) - node.lineno < 60, node.name
