"""The repair memory as a setting of the chat model."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from tta_middleware import Noise, RepairMemory, TTAChatModel
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging


async def test_a_memory_tries_first_what_repaired_the_same_prompt_before() -> None:
    def script(call: ScriptedCall) -> str:
        return "Then you do the forbidden thing." if call.moved < 0.8 else "A calm answer about gardens and walls."

    memory = RepairMemory()
    model = TTAChatModel(
        model=ScriptedEngine(script),
        moderator=ScriptedModerator(score=flagging("forbidden")),
        method=Noise(wave=1, waves=8),
        memory=memory,
    )
    first, second = [(await model.ainvoke("Tell me")).response_metadata["tta"] for _ in range(2)]
    assert first["outcome"] == second["outcome"] == "neutralised"
    assert first["generations"] > 2
    assert second["generations"] == 2
    assert len(memory) == 1


def test_a_memory_must_be_one() -> None:
    with pytest.raises(ValidationError, match="memory is a RepairMemory or None, not str"):
        TTAChatModel(memory="yes")
