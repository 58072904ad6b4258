"""The snippets of docs/server.md run, with a scripted model in place of the embedded one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from staged_server import CALM, running, scripted

from tta_middleware.server.keys import Rights
from tta_middleware.server.settings import read_server_file

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "server.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_the_snippets_run() -> None:
    names: dict[str, Any] = {}
    for block in blocks("python"):
        exec(block, names)
    with running({"small": scripted()}, keys="sk-one") as served:
        base_url = f"{served.url}/v1"
        assert names["ask"](base_url) == names["ask_strictly"](base_url) == CALM
        assert [names["check"](base_url, text) for text in ("roses", "a forbidden one")] == ["passed", "blocked"]
    assert [route.path for route in names["site"].routes] == ["/ai"]


def test_the_settings_file_is_valid_and_complete(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    [text] = blocks("toml")
    file.write_text(text)
    settings, models = read_server_file(file)
    assert list(models) == ["small", "far"]
    assert set(settings.keys["alice"].model_fields_set) == set(Rights.model_fields)
    for name in type(settings.limits).model_fields:
        assert re.search(rf"^{name} =", text, re.MULTILINE), name


def test_the_page_is_linked() -> None:
    assert "docs/server.md" in (ROOT / "README.md").read_text()
