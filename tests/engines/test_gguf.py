"""GGUF files of every family that transformers reads: they decode as the model that they were made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import GGUF_FAMILIES, GPT_OSS, GGUFFamily, write_gguf
from test_families import generated, moved

from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.errors import EngineError
from tta_middleware.types import GenerationRequest, Message, Sampling

TEXTS = ("Hi", "What do the bees eat in winter, and where?")


def made(family: GGUFFamily, folder: Path, quantized: Any = None, more: Any = None) -> tuple[Path, Any]:
    """A file, and the folder of the same model as transformers keeps it."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family.config(), dtype=torch.float32).eval()
    write_gguf(family, model, folder / "tiny.gguf", quantized, more)
    model.save_pretrained(str(folder / "own"))
    return folder / "tiny.gguf", model


def marked(family: GGUFFamily) -> Any:
    quick = family.model_type == "qwen2"
    return pytest.param(family, id=family.model_type, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize("family", [marked(family) for family in GGUF_FAMILIES])
async def test_a_file_decodes_as_the_model_it_was_made_of(family: GGUFFamily, tmp_path: Path) -> None:
    file, model = made(family, tmp_path)
    engine = TransformersEngine(str(file), dtype="float32", cache_dir=tmp_path / "cache")
    prompts = [await engine.embed([Message("user", text)]) for text in TEXTS]
    assert await engine.token_ids("<|im_start|>") != [1], "a turn cannot be forged"
    for prompt in prompts:
        assert prompt.matrix == pytest.approx(rows(model, prompt.token_ids), abs=1e-5)
    prompts.append(moved(prompts[1]))
    done = await engine.generate_batch([GenerationRequest(prompt, Sampling(max_new_tokens=10)) for prompt in prompts])
    await engine.aclose()
    found = [list(completion.token_ids) for completion in done]
    assert found == [generated(str(tmp_path / "own"), prompt, 10) for prompt in prompts]


def rows(model: Any, token_ids: Any) -> Any:
    import torch

    with torch.inference_mode():
        return model.get_input_embeddings()(torch.from_numpy(np.asarray(token_ids))).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q8_0", "BF16"])
async def test_quantised_matrices_become_numbers(kind: str, tmp_path: Path) -> None:
    import gguf
    import torch

    family = next(one for one in GGUF_FAMILIES if one.model_type == "qwen2")
    quantized = gguf.GGMLQuantizationType[kind]
    file, model = made(family, tmp_path, quantized)
    for weight in model.state_dict().values():
        if weight.dim() == 2 and weight.shape[1] % 32 == 0:
            kept = gguf.quants.quantize(weight.numpy(), quantized)
            weight.copy_(torch.from_numpy(gguf.quants.dequantize(kept, quantized)))
    model.save_pretrained(str(tmp_path / "own"))
    engine = TransformersEngine(str(file), dtype="float32", cache_dir=tmp_path / "cache")
    prompt = await engine.embed([Message("user", TEXTS[1])])
    [done] = await engine.generate_batch([GenerationRequest(prompt, Sampling(max_new_tokens=10))])
    await engine.aclose()
    assert list(done.token_ids) == generated(str(tmp_path / "own"), prompt, 10)


async def test_a_file_whose_weights_transformers_does_not_find_is_refused(tmp_path: Path) -> None:
    """It would leave them at random numbers, and the model would talk nonsense."""
    file, _ = made(GPT_OSS, tmp_path)
    engine = TransformersEngine(str(file), dtype="float32", cache_dir=tmp_path / "cache")
    with pytest.raises(EngineError, match=r"does not find all weights .*experts"):
        await engine.load()
    await engine.aclose()


async def test_what_transformers_leaves_out_of_a_file_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    family = next(one for one in GGUF_FAMILIES if one.model_type == "qwen2")
    file, _ = made(family, tmp_path, more={"rope.scaling.factor": 4.0})
    engine = TransformersEngine(str(file), dtype="float32", cache_dir=tmp_path / "cache")
    await engine.load()
    await engine.aclose()
    assert "tiny.gguf scales its rotary embeddings for long contexts (qwen2.rope.scaling.factor)" in caplog.text
