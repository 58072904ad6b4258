"""Quantised weights that run on a CPU: as transformers' own generate, the same as whole, and through a repair."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quantised
from test_families import moved

from tta_middleware import Budget, Guard, Noise, QualityBounds, QualityGate, Repair
from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator
from tta_middleware.types import GenerationRequest, GuardedAnswer, Message, PromptEmbeddings, Sampling

pytestmark = pytest.mark.slow

TEXTS = ("Hi", "A somewhat longer prompt, beside the other.")
ASK = [Message("user", "What do bees eat?")]
PROJECTIONS = ("proj.weight",)
_SCHEME = {"targets": ["Linear"], "input_activations": None, "output_activations": None}
_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": quantised.GROUP, "symmetric": True}
_INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
_COMPRESSED = {"quant_method": "compressed-tensors", "ignore": ["lm_head"], "quantization_status": "compressed"}
_GPTQ = ("gptqmodel", "optimum")

# Method: what writes it, the settings in the config, and the modules without which it is skipped.
CHECKPOINTS: dict[str, tuple[quantised.Writer, dict[str, Any], tuple[str, ...]]] = {
    "fp8": (quantised.fp8, {"quant_method": "fp8", "weight_block_size": [32, 32]}, ()),
    "compressed-tensors W4A16": (
        quantised.pack_quantized,
        {**_COMPRESSED, "format": "pack-quantized", "config_groups": {"0": {**_SCHEME, "weights": _INT4}}},
        ("compressed_tensors",),
    ),
    "compressed-tensors W8A16": (
        quantised.int_quantized,
        {**_COMPRESSED, "format": "int-quantized", "config_groups": {"0": {**_SCHEME, "weights": _INT8}}},
        ("compressed_tensors",),
    ),
    "gptq": (
        quantised.gptq,
        {"quant_method": "gptq", "bits": 4, "group_size": quantised.GROUP, "desc_act": False, "sym": True},
        _GPTQ,
    ),
    "awq": (
        quantised.awq,
        {"quant_method": "awq", "bits": 4, "group_size": quantised.GROUP, "zero_point": True, "version": "gemm"},
        _GPTQ[:1],
    ),
}


@pytest.fixture(scope="module")
def folder(save_model: Callable[[Any], Path], tiny_sizes: dict[str, Any]) -> Path:
    """A Llama whose sizes the kernels of every method take."""
    from transformers import LlamaConfig

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4, "head_dim": 32}
    return save_model(LlamaConfig(**{**tiny_sizes, **sizes, "initializer_range": 0.1, "tie_word_embeddings": False}))


async def check(folder: Path, expected: Any, **options: Any) -> None:
    """The engine decodes as ``expected`` generates, packed, from rows of the table as numbers, and repairs."""
    engine = TransformersEngine(str(folder), dtype="float32", device="cpu", **options)
    assert (await engine.way())[0] == "packed"
    prompts = [await engine.embed([Message("user", text)]) for text in TEXTS]
    prompts.append(moved(prompts[1]))
    requests = [GenerationRequest(prompt, Sampling(max_new_tokens=8)) for prompt in prompts]
    found = [list(completion.token_ids) for completion in await engine.generate_batch(requests)]
    assert found == [generated(expected, prompt) for prompt in prompts]
    assert prompts[0].matrix == pytest.approx(looked_up(expected, prompts[0]), abs=1e-6)
    answer = await repaired(engine)
    await engine.aclose()
    assert (answer.trace.outcome, answer.trace.decodes_to_original) == ("neutralised", True)
    assert answer.trace.relative_move is not None
    assert answer.trace.relative_move > 0.1


def generated(model: Any, prompt: PromptEmbeddings) -> list[int]:
    import torch

    rows = torch.from_numpy(np.ascontiguousarray(prompt.matrix))[None]
    mask = torch.ones(rows.shape[:2], dtype=torch.long)
    with torch.inference_mode():
        out = model.generate(inputs_embeds=rows, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=2)
    return list(out[0].tolist())


def looked_up(model: Any, prompt: PromptEmbeddings) -> Any:
    import torch

    with torch.inference_mode():
        return model.get_input_embeddings()(torch.from_numpy(prompt.token_ids)).float().numpy()


async def repaired(engine: TransformersEngine) -> GuardedAnswer:
    """What the guard makes of an answer whose first version is flagged; random weights write no prose."""
    first: list[str] = []

    def score(text: str) -> dict[str, float]:
        first.append(text)
        return {"illicit": 0.9 if text == first[0] else 0.0}

    quality = QualityGate(
        QualityBounds(min_words=1, min_letter_share=0.01, max_repeated_share=1.0, max_compression=50.0, max_nll=50.0)
    )
    repair = Repair(method=Noise(radius_from=0.2, radius_to=0.3), budget=Budget(generations=12))
    guard = Guard(engine, ScriptedModerator(score=score), quality=quality, repair=repair)
    return await guard.answer(ASK, Sampling(max_new_tokens=12))


def loaded(folder: Path, **options: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, device_map={"": "cpu"}, **options
    ).eval()


@pytest.mark.parametrize("method", CHECKPOINTS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
# gptqmodel leaves a temporary folder to the interpreter.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_quantised_checkpoint_decodes_as_its_weights_do_when_they_are_numbers(
    method: str, folder: Path, tmp_path: Path
) -> None:
    writer, settings, modules = CHECKPOINTS[method]
    for module in modules:
        pytest.importorskip(module, reason=f"{module} is not installed; it reads {method} checkpoints")
    kept, whole = quantised.write(folder, tmp_path, writer, PROJECTIONS, settings)
    await check(kept, loaded(whole))


async def test_gpt_oss_with_mxfp4_experts_decodes_as_with_experts_that_are_numbers(
    save_model: Callable[[Any], Path], tiny_sizes: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import GptOssConfig

    sizes = {"hidden_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 7}
    folder = save_model(GptOssConfig(**{**tiny_sizes, **sizes, "head_dim": 16, "tie_word_embeddings": False}))
    settings = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    }
    ends = ("experts.gate_up_proj", "experts.down_proj")
    await check(*_with_model(quantised.write(folder, tmp_path, quantised.mxfp4, ends, settings)))


def _with_model(folders: tuple[Path, Path]) -> tuple[Path, Any]:
    return folders[0], loaded(folders[1])


@pytest.mark.parametrize("quantization", ["bnb-4bit", "bnb-8bit"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:MatMul8bitLt:UserWarning")
async def test_bitsandbytes_quantises_while_loading_and_reads_what_it_saved(
    quantization: str, folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    import torch
    from transformers import BitsAndBytesConfig

    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    options: Mapping[str, Mapping[str, Any]] = {
        "bnb-4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
        "bnb-8bit": {"load_in_8bit": True},
    }
    model = loaded(folder, quantization_config=BitsAndBytesConfig(**options[quantization]))
    await check(folder, model, quantization=quantization)
    model.save_pretrained(str(tmp_path))
    tokenizer.save_pretrained(str(tmp_path))
    await check(tmp_path, loaded(tmp_path))


@pytest.mark.parametrize("embeddings", [False, True], ids=["layers", "embeddings too"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
async def test_torchao_with_the_table_as_numbers_where_that_is_quantised(
    embeddings: bool, folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    import torch
    from transformers import TorchAoConfig

    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    layers: Any = Int8WeightOnlyConfig()
    if embeddings:
        table = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerGroup(32))
        layers = FqnToConfig({"model.embed_tokens": table, r"re:.*proj": layers})
    settings = TorchAoConfig(quant_type=layers, include_input_output_embeddings=embeddings)
    model = loaded(folder, quantization_config=settings)
    model.save_pretrained(str(tmp_path))
    tokenizer.save_pretrained(str(tmp_path))
    assert (type(model.get_input_embeddings().weight.data) is not torch.Tensor) == embeddings
    await check(tmp_path, model)
