"""What the site's generator does differently from a forge that shows the same files.

Pages of ``docs/decisions`` and ``docs/results`` come into the navigation by themselves, and so does, at its end, any
page that nobody put in. Links that leave ``docs`` (to a script, an example) work beside a checkout. A site has
none, so there they become the path as text.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")


def on_config(config: Any) -> Any:
    """The navigation with all pages in it."""
    docs = Path(config["docs_dir"])
    pages = sorted(path.relative_to(docs).as_posix() for path in docs.rglob("*.md"))
    sections = {name: entries for section in config["nav"] for name, entries in section.items()}
    for name, folder in (("Decisions", "decisions/"), ("Results", "results/")):
        sections[name] += [page for page in pages if page.startswith(folder) and page not in sections[name]]
    if left := [page for page in pages if page not in set(named(config["nav"]))]:
        config["nav"].append({"More": left})
    return config


def named(nav: Any) -> Iterator[str]:
    """The pages in a navigation."""
    if isinstance(nav, str):
        yield nav
    for entry in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from named(entry)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The page's text with links out of ``docs`` written out."""
    folder = posixpath.dirname(page.file.src_uri)

    def written_out(link: re.Match[str]) -> str:
        text, target = link[1], link[2]
        path = posixpath.normpath(posixpath.join(folder, target.partition("#")[0]))
        if ":" in target or not path.startswith(".."):
            return link[0]
        return f"{text} (`{path.removeprefix('../')}` in the repository)"

    return _LINK.sub(written_out, markdown)
