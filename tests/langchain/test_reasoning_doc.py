"""The snippets of docs/reasoning.md run, with a scripted model in place of the one from the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tta_middleware import TTAChatModel
from tta_middleware.policy.file import PolicyFile
from tta_middleware.testing.scripted_engine import ScriptedEngine

TEXT = (Path(__file__).parents[2] / "docs" / "reasoning.md").read_text()


def test_the_snippet_runs(capsys: pytest.CaptureFixture[str]) -> None:
    [code] = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    code, replaced = re.subn(r'model="path[^"]*"', "model=engine", code)
    assert replaced == 1
    engine = ScriptedEngine("<think>Bees need hives.</think>Keep them dry.", thinking=True)
    names: dict[str, Any] = {"engine": engine, "__name__": __name__}
    exec(code, names)
    assert isinstance(names["model"], TTAChatModel)
    shown = ["reasoning Bees need hives.", "text Keep them dry.", "Keep them dry.", "True"]
    assert capsys.readouterr().out.splitlines() == shown


def test_the_policy_loads(tmp_path: Path) -> None:
    [table] = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "policies.toml").write_text(table)
    stages = PolicyFile(tmp_path / "policies.toml").get()
    assert stages.hidden_reasoning == "unchecked"
    assert (stages.output.threshold, stages.at("reasoning").threshold) == (0.3, 0.5)
