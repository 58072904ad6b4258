"""The snippets of docs/testing.md run."""

from __future__ import annotations

import asyncio
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

TEXT = (Path(__file__).parents[2] / "docs" / "testing.md").read_text()


@pytest.mark.no_audit("the snippets open auditors of their own")
def test_the_snippets_run() -> None:
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(block, names)
    for name in ("answers", "nothing_leaves_too_early", "survives_an_outage"):
        asyncio.run(names[name]())


def test_every_module_that_is_named_is_there() -> None:
    for name in set(re.findall(r"`(?:tta_middleware\.)?(testing\.\w+)`", TEXT)):
        importlib.import_module(f"tta_middleware.{name}")


def test_what_the_page_lists_is_linked() -> None:
    assert "docs/testing.md" in (Path(__file__).parents[2] / "README.md").read_text()
