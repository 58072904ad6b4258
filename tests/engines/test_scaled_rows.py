"""Gemma on engines whose model decodes elsewhere: rows are scaled in one place only, wherever that is."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import FAMILIES

from tta_middleware.engines.remote import RemoteEngine, Step
from tta_middleware.errors import ConfigurationError
from tta_middleware.types import GenerationRequest, Message, Sampling


class Elsewhere(RemoteEngine):
    """A model that multiplies the rows that it is given, or takes them as they are, as vLLM's do by family."""

    def __init__(self, model: str, *, scales: bool, deaf: bool = False) -> None:
        super().__init__(model)
        self._scales, self._deaf = scales, deaf

    def _start(self, folder: str, vocabulary: Any) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    async def _steps(self, request: GenerationRequest) -> AsyncGenerator[Step, None]:
        import torch

        rows = torch.from_numpy(np.ascontiguousarray(request.prompt.matrix))[None]
        if self._deaf:
            rows = rows * 0.0
        with torch.inference_mode():
            for _ in range(request.sampling.max_new_tokens):
                given = rows * self._words.family_scale if self._scales else rows
                token = int(self.model(inputs_embeds=given, use_cache=False).logits[0, -1].argmax())
                own = self._words.table[[token]][None]
                rows = torch.cat([rows, own if self._scales else own * self._words.family_scale], dim=1)
                yield [token], None
        yield [], "length"

    async def _log_likelihoods(self, token_ids: Sequence[int]) -> list[float]:
        import torch

        ids = torch.tensor(token_ids)[None]
        with torch.inference_mode():
            likely = self.model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        return [0.0, *likely[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()]

    async def _stop(self) -> None:
        """Nothing to do."""


@pytest.fixture(scope="module")
def gemma(save_model: Callable[[Any], Path]) -> str:
    [family] = [family for family in FAMILIES if family.model_type == "gemma2"]
    return str(save_model(family.config()))


@pytest.mark.parametrize("scales", [True, False])
async def test_an_answer_is_that_of_the_tokens_wherever_rows_are_scaled(gemma: str, scales: bool) -> None:
    import torch

    engine = Elsewhere(gemma, scales=scales)
    prompt = await engine.embed([Message("user", "Hi")])
    [completion] = await engine.generate_batch([GenerationRequest(prompt, Sampling(max_new_tokens=8))])
    ids = torch.from_numpy(prompt.token_ids)[None]
    with torch.inference_mode():
        out = engine.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=2
        )
    assert list(completion.token_ids) == out[0, ids.shape[1] :].tolist()
    await engine.aclose()


async def test_where_it_cannot_be_told_the_model_is_refused(gemma: str) -> None:
    engine = Elsewhere(gemma, scales=False, deaf=True)
    with pytest.raises(ConfigurationError, match="cannot be told whether vLLM scales"):
        await engine.load()
    await engine.aclose()
