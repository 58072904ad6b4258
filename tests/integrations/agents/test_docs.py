"""docs/agents.md: its snippets run, and the settings that it names exist."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain.agents.middleware import configure_trace_policy
from tta_langchain_agents import GuardedChatModel, TTAMiddleware

TEXT = (Path(__file__).parents[3] / "docs" / "agents.md").read_text()


@pytest.fixture
def _usual_traces() -> Iterator[None]:
    yield
    configure_trace_policy(None)


@pytest.mark.usefixtures("_usual_traces")
def test_the_snippets_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    names: dict[str, Any] = {"tools": []}
    blocks = re.findall(r"^( *)```python\n(.*?)^ *```", TEXT, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    for _, block in blocks:
        exec(textwrap.dedent(block), names)
    assert isinstance(names["model"], GuardedChatModel)
    assert type(names["agent"]).__name__ == "CompiledStateGraph"


def test_the_settings_exist() -> None:
    settings = {*inspect.signature(TTAMiddleware).parameters, *GuardedChatModel.model_fields}
    named = set(re.findall(r"`(\w+)=", TEXT))
    assert named - settings - {"policy", "finish_reason", "stream_mode", "subgraphs", "checkpointer"} == set()
    assert {"check_state", "check_artifacts", "check_history", "check_prompt", "on_flagged"} <= named
