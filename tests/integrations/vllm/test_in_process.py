"""vLLM in this process against the engine contract, and repairs through it."""

from __future__ import annotations

from collections.abc import Iterator

import anyio
import pytest
from tta_vllm import VLLMEngine

from tta_middleware import Guard, Message, Noise, Repair, Sampling
from tta_middleware.moderation.embedded import EmbeddedModerator
from tta_middleware.testing.engine import EngineContract
from tta_middleware.types import GenerationRequest


@pytest.fixture(scope="module")
def shared() -> Iterator[VLLMEngine]:
    engine = VLLMEngine("smollm2", dtype="float32", max_model_len=2048, max_num_seqs=16, enforce_eager=True)
    yield engine
    anyio.run(engine.aclose)


class TestVLLMInProcess(EngineContract):
    @pytest.fixture
    async def engine(self, shared: VLLMEngine) -> VLLMEngine:
        return shared

    async def test_its_batch_is_empty_again_after_a_stream_is_closed(self, engine: VLLMEngine) -> None:
        prompt = await engine.embed([Message("user", "Count to one thousand.")])
        stream = engine.stream(GenerationRequest(prompt, Sampling(max_new_tokens=1500)))
        await anext(stream)
        await stream.aclose()
        with anyio.fail_after(30):
            while engine.open_requests:  # noqa: ASYNC110  vLLM works in another process
                await anyio.sleep(0.01)

    async def test_a_guard_repairs_through_prompt_embeddings(self, engine: VLLMEngine) -> None:
        guard = Guard(engine, EmbeddedModerator(), policy=0.02, repair=Repair(method=Noise()))
        answer = await guard.answer([Message("user", "Tell me about knives.")], Sampling(max_new_tokens=24))
        assert answer.trace.outcome in ("clean", "neutralised", "blocked")
        assert answer.text
