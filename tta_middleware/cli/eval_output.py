"""The report files of ``tta eval``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tta_middleware.batch.standard import note
from tta_middleware.errors import ConfigurationError, MissingExtraError
from tta_middleware.files.jsonl import Record


def check_extra(*, detailed: bool) -> None:
    """Tell before the work, not after it, that a package is missing.

    Raises:
        MissingExtraError: the report or tests were asked for and the extra ``eval`` is not installed.
    """
    missing = [name for name in ("scipy", "matplotlib") if detailed and find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"--report and --reference need {' and '.join(missing)}; run: pip install 'tta-middleware[eval]'"
        )


def write(path: Path, summary: Mapping[str, Any], table: str, records: Sequence[Record], *, examples: int) -> None:
    """Write the page to ``path``, and the tables in Markdown beside it.

    Raises:
        ConfigurationError: the file cannot be written.
    """
    from tta_middleware.evaluation.report import to_html

    page = to_html(summary, records, examples=examples)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
        path.with_suffix(".md").write_text(table, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"cannot write the report to {path}: {error.strerror}") from None
    note(f"report: {path} and {path.with_suffix('.md').name}")
