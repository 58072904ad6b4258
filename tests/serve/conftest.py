"""Servers for tests, and their log."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
from staged_server import Log, Served, running


@pytest.fixture
def served() -> Iterator[Served]:
    """A server with default settings."""
    with running() as one:
        yield one


@pytest.fixture
def log() -> Iterator[Log]:
    handler, logger = Log(), logging.getLogger("tta_middleware.server")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(before)
