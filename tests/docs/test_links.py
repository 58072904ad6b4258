"""The documentation hangs together: links, anchors, pictures, the site's navigation; without the site's generator."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md"))]
LINK = re.compile(r"\[(?:[^\]\[]|\[[^\]]*\])*\]\(\s*([^)\s]+)\s*\)")
FENCE = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)
MOST_OF_A_PICTURE = 150_000


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """As forges and the site's generator make them of headings."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower() for title in titles)
    return {re.sub(r"[^\w\- ]", "", title).strip().replace(" ", "-") for title in plain}


def broken(page: Path, target: str) -> bool:
    path, _, anchor = target.partition("#")
    found = page if not path else (page.parent / path).resolve()
    if not found.exists():
        return True
    return bool(anchor) and found.suffix == ".md" and anchor not in anchors(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = [target for target in LINK.findall(prose(page)) if not re.match(r"[a-z]+:", target)]
    assert [target for target in targets if broken(page, target)] == []


def test_pictures_are_small_and_shown() -> None:
    shown = {target for page in PAGES for target in LINK.findall(prose(page))}
    for picture in (DOCS / "images").iterdir():
        assert picture.stat().st_size < MOST_OF_A_PICTURE, picture
        assert any(target.endswith(picture.name) for target in shown), picture


def test_the_sites_navigation_names_pages_that_are_there() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = re.findall(r"([\w/.-]+\.md)\b", text.partition("\nnav:")[2])
    assert [name for name in named if not (DOCS / name).exists()] == []
    assert len(named) == len(set(named)) > 20
    assert yaml.safe_load(text)["strict"] is True


def test_the_reference_names_modules_and_members_that_are_there() -> None:
    for page in (DOCS / "api").glob("*.md"):
        for name in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            _import(name)


def _import(name: str) -> object:
    from importlib import import_module

    try:
        return import_module(name)
    except ModuleNotFoundError:
        home, _, member = name.rpartition(".")
        return getattr(_import(home), member)
