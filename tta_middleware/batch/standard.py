"""The standard streams: records for machines on stdout, lines for people on stderr."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from tta_middleware.files.jsonl import dump


def emit(record: Mapping[str, Any]) -> None:
    """One JSON object on a line of stdout, sent at once, so that a pipe's reader need not wait."""
    sys.stdout.write(dump(dict(record)) + "\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """A line on stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
