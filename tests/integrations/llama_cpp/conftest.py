"""llama.cpp with the embedded model; the whole folder is skipped where xllamacpp is not installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import anyio
import pytest
from tta_llama_cpp import LlamaCppEngine

from tta_middleware.engines.transformers import TransformersEngine

if importlib.util.find_spec("xllamacpp") is None:
    collect_ignore_glob = ["test_*.py"]

PLACES = 3


@pytest.fixture(scope="session")
def llama() -> Iterator[LlamaCppEngine]:
    engine = LlamaCppEngine("smollm2", max_batch=PLACES, context=512, threads=1)
    yield engine
    anyio.run(engine.aclose)


@pytest.fixture(scope="session")
def smollm2() -> Iterator[TransformersEngine]:
    engine = TransformersEngine("smollm2", dtype="float32")
    yield engine
    anyio.run(engine.aclose)
