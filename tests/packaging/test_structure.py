"""The arrows between modules, counted by the project's own script, type checking and late imports included."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "structure.py"


def structure(root: Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("grimp")
    return subprocess.run([sys.executable, SCRIPT, root], capture_output=True, text=True, timeout=120)


@pytest.mark.skipif("TTA_EXPECT_WHEEL" in os.environ, reason="the wheel's tests have no checkout beside them")
@pytest.mark.slow
def test_no_cycle_and_no_arrow_back_up() -> None:
    found = structure(ROOT)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "import cycles: 0 of modules, 0 of rooms" in found.stdout
    assert "arrows back up: 0" in found.stdout


def test_a_cycle_and_an_arrow_back_up_are_found_wherever_the_import_stands(tmp_path: Path) -> None:
    package = tmp_path / "tta_middleware"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "high.py").write_text("from tta_middleware import low\n")
    (package / "low.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from tta_middleware.high import x\n"
    )
    layers = "[[tool.importlinter.contracts]]\ntype = 'layers'\nlayers = ['high', '(low) | (other)']\n"
    (tmp_path / "pyproject.toml").write_text(layers)
    found = structure(tmp_path)
    assert found.returncode == 1
    assert "tta_middleware.high <-> tta_middleware.low" in found.stdout
    assert "arrows back up: 1\n    tta_middleware.low -> tta_middleware.high" in found.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "integrations").rglob("*.py")), ids=lambda path: str(path.name))
def test_integrations_import_public_names_only(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tta_"):
            words = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            assert [word for word in words if word.startswith("_")] == []


def test_what_tests_import_by_its_bare_name_stands_once() -> None:
    """Folders of tests stand on one path, so the other of two modules with a name is taken once its folder is there."""
    files = sorted((ROOT / "tests").rglob("*.py"))
    bare = re.compile(r"^\s*(?:from|import) (\w+)", re.MULTILINE)
    imported = {name for path in files for name in bare.findall(path.read_text(encoding="utf-8"))}
    names = Counter(path.stem for path in files if path.stem in imported and path.stem != "conftest")
    assert [name for name, count in names.items() if count > 1] == []
