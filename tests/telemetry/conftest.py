"""Telemetry into memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "serve"))
from memory import Memory

from tta_middleware.observing import observe_everywhere
from tta_middleware.telemetry import instrument


@pytest.fixture
def memory() -> Iterator[Memory]:
    """What this process tells until the test ends."""
    told = Memory()
    before = observe_everywhere(None)
    instrument(tracer_provider=told.tracers, meter_provider=told.meters)
    yield told
    observe_everywhere(before)
    told.check_ends()
