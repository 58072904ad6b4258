"""Families beside Llama, as tiny random models: batched decoding must equal each one's own generate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.errors import ConfigurationError
from tta_middleware.types import GenerationRequest, Message, Sampling

TEXTS = ("Hi", "A somewhat longer prompt, so that rows are padded.", "One more, in between.")

GPT2 = {
    "vocab_size": 49152,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "initializer_range": 0.4,
    "eos_token_id": 2,
    "bos_token_id": 2,
}

# Family, and what it adds: windows shorter than the prompts, so that sliding layers matter.
FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaConfig": {},
    "Qwen2Config": {},
    "Qwen3Config": {},
    "MistralConfig": {"sliding_window": 7},
    "Phi3Config": {"sliding_window": 9},
    "Gemma2Config": {"sliding_window": 7},
    "Gemma3TextConfig": {"sliding_window": 7},
    "GPT2Config": GPT2,
}


@pytest.mark.parametrize("family", FAMILIES)
async def test_joining_and_leaving_rows_decode_like_generate(
    family: str, save_model: Callable[[Any], Path], tiny_sizes: dict[str, Any]
) -> None:
    import torch
    import transformers

    sizes = {} if family == "GPT2Config" else tiny_sizes
    config = getattr(transformers, family)(**{**sizes, **FAMILIES[family]})
    folder = str(save_model(config))
    engine = TransformersEngine(folder, dtype="float32", max_batch=2)
    prompts = [await engine.embed([Message("user", text)]) for text in TEXTS]
    # Two places and three rows of different lengths: the third joins when the first leaves.
    lengths = (9, 24, 16)
    completions = await engine.generate_batch(
        [GenerationRequest(p, Sampling(max_new_tokens=n)) for p, n in zip(prompts, lengths, strict=True)]
    )
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    device = engine._loaded.device
    model.to(device)
    for prompt, length, completion in zip(prompts, lengths, completions, strict=True):
        ids = torch.tensor(prompt.token_ids, device=device)[None]
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=length, do_sample=False, pad_token_id=2)
        assert list(completion.token_ids) == out[0, ids.shape[1] :].tolist()
    await engine.aclose()


async def test_recurrent_models_are_refused(save_model: Callable[[Any], Path], tiny_sizes: dict[str, Any]) -> None:
    from transformers import Lfm2Config

    sizes = {**tiny_sizes, "layer_types": ["conv", "full_attention"]}
    engine = TransformersEngine(str(save_model(Lfm2Config(**sizes))))
    with pytest.raises(ConfigurationError, match="conv layers"):
        await engine.load()
