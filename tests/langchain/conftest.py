"""One embedded model and one embedded moderator for all LangChain tests of a run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tta_middleware import TTAChatModel
from tta_middleware.aio import bridge
from tta_middleware.assembly import Runtime

sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="session")
def runtime() -> Iterator[Runtime]:
    shared = Runtime()
    yield shared
    bridge.run(shared.aclose)
    bridge.shutdown()


@pytest.fixture
def model(runtime: Runtime) -> TTAChatModel:
    return TTAChatModel(model="smollm2", moderator="local", max_new_tokens=12, dtype="float32", runtime=runtime)
