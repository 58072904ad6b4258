"""vLLM in this process against the engine contract, and repairs through it."""

from __future__ import annotations

import anyio
import pytest
from tta_vllm import VLLMEngine

from tta_middleware import Message, Sampling
from tta_middleware.testing.engine import EngineContract
from tta_middleware.types import GenerationRequest, GuardedAnswer

THRESHOLD = 0.04


class TestVLLMInProcess(EngineContract):
    @pytest.fixture
    async def engine(self, in_process: VLLMEngine) -> VLLMEngine:
        return in_process

    async def test_its_batch_is_empty_again_after_a_stream_is_closed(self, engine: VLLMEngine) -> None:
        prompt = await engine.embed([Message("user", "Count to one thousand.")])
        stream = engine.stream(GenerationRequest(prompt, Sampling(max_new_tokens=1500)))
        await anext(stream)
        await stream.aclose()
        with anyio.fail_after(30):
            while engine.open_requests:  # noqa: ASYNC110  vLLM works in another process
                await anyio.sleep(0.01)

    def test_a_guard_repairs_through_prompt_embeddings(self, repaired_in_process: list[GuardedAnswer]) -> None:
        found = {answer.trace.outcome for answer in repaired_in_process}
        assert "neutralised" in found
        for answer in repaired_in_process:
            if answer.trace.outcome == "neutralised":
                assert answer.trace.final is not None
                assert answer.trace.final.score < THRESHOLD
                assert answer.trace.relative_move > 0
