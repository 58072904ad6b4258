"""The snippets of docs/tools.md run, with a scripted model in place of the one from the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tta_middleware import TTAChatModel
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine

TEXT = (Path(__file__).parents[2] / "docs" / "tools.md").read_text()
OPENING = '{"place": "library", "hour": 9}'


def script(call: ScriptedCall) -> str:
    if call.prefix:
        return f" {OPENING}}}\n</tool_call>"
    if "JSON object" in call.conversation:
        return OPENING
    if "<|tool|>" in call.conversation:
        return call.conversation.rpartition("<|tool|>")[2]
    return '<tool_call>{"name": "opening_hours", "arguments": {"place": "library"}}</tool_call>'


def test_the_snippets_run(capsys: pytest.CaptureFixture[str]) -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL))
    code, replaced = re.subn(r"^model = .*$", "", code, flags=re.MULTILINE)
    assert replaced == 1
    names: dict[str, Any] = {"model": TTAChatModel(model=ScriptedEngine(script), policy=0.99), "__name__": __name__}
    exec(code, names)
    calls, answer, by_tool, by_instruction = capsys.readouterr().out.splitlines()
    assert "'args': {'place': 'library'}" in calls
    assert answer == "The library opens at nine."
    assert by_tool == by_instruction == "place='library' hour=9"
