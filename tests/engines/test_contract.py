"""Both engines against the conformance suite that users get."""

from __future__ import annotations

import pytest

from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.testing.engine import EngineContract
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine


class TestTransformers(EngineContract):
    @pytest.fixture
    def engine(self, smollm2: TransformersEngine) -> TransformersEngine:
        return smollm2


def _ramble(call: ScriptedCall) -> str:
    return " ".join(f"{word}-{number} 🏙️" for number in range(200) for word in call.text.split()[:3])


class TestScripted(EngineContract):
    @pytest.fixture
    def engine(self) -> ScriptedEngine:
        return ScriptedEngine(_ramble)


class TestThinking(EngineContract):
    @pytest.fixture
    def engine(self) -> ScriptedEngine:
        return ScriptedEngine(lambda call: f"<think>Hm.</think>{_ramble(call)}", thinking=True)
