"""Every example and the README's snippets run as they stand.

The quick run has the README's in this process, which has read torch already, and the examples that need none in one of
their own; the slow one starts each by itself, as a user does.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tta_middleware.aio import bridge

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
QUICK = ("graph.py", "upstream.py")
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def cells(notebook: Path) -> str:
    """A notebook's code, which has to run without Jupyter, too."""
    found = nbformat.read(notebook, as_version=4)["cells"]
    return "\n\n".join(cell["source"] for cell in found if cell["cell_type"] == "code")


def run(*command: str) -> str:
    environment = os.environ | {"PYTHONWARNINGS": "error::ResourceWarning"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


IN_ONE_PROCESS = """
import json, runpy, sys
from contextlib import redirect_stdout
from io import StringIO
for path in sys.argv[1:]:
    said = StringIO()
    with redirect_stdout(said):
        runpy.run_path(path, run_name="__main__")
    print(json.dumps([path, said.getvalue()]))
"""


@pytest.mark.parametrize("code", SNIPPETS, ids=range(len(SNIPPETS)))
def test_readme_snippet_in_this_process(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert capsys.readouterr().out.strip()
    bridge.run(names["model"].aclose)


def test_short_examples_run_in_one_process() -> None:
    paths = [str(path) for path in EXAMPLES if path.name in QUICK]
    said = dict(json.loads(line) for line in run("-c", IN_ONE_PROCESS, *paths).splitlines())
    assert list(said) == paths
    assert all(said[path].strip() for path in paths)
    graph, upstream = (said[str(ROOT / "examples" / name)] for name in ("graph.py", "upstream.py"))
    assert graph.endswith("the flagged text is in a checkpoint: False\n")
    assert "in spring. [stop]" in upstream
    assert upstream.endswith("[content_filter]\n")
    assert "idiot" not in upstream + graph


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example(path: Path) -> None:
    assert run(str(path)).strip()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_valid_and_holds_no_outputs_that_may_be_old(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert code
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs_by_itself(path: Path) -> None:
    assert "repair 1" in run("-c", cells(path))


def test_the_readme_has_a_snippet() -> None:
    assert SNIPPETS


@pytest.mark.slow
@pytest.mark.parametrize("code", SNIPPETS, ids=range(len(SNIPPETS)))
def test_readme_snippet(code: str) -> None:
    assert run("-c", code).strip()
