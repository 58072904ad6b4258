"""Loading as people load: device maps, quantised checkpoints, shards, adapters, revisions, a model's own code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tta_middleware import TTAChatModel
from tta_middleware.cli.typed import engine_options
from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.errors import ConfigurationError, MissingExtraError, ModelNotFoundError
from tta_middleware.types import GenerationRequest, Message, Sampling


async def answer(folder: Path | str, **options: Any) -> tuple[int, ...]:
    engine = TransformersEngine(str(folder), dtype="float32", **options)
    prompt = await engine.embed([Message("user", "Hi")])
    [completion] = await engine.generate_batch([GenerationRequest(prompt, Sampling(max_new_tokens=6))])
    await engine.aclose()
    return completion.token_ids


async def test_shards_and_a_device_map_load_like_one_file(tiny_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    shutil.copytree(tiny_folder, tmp_path / "shards", ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(str(tiny_folder)).save_pretrained(
        str(tmp_path / "shards"), max_shard_size="20KB"
    )
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    expected = await answer(tiny_folder)
    assert await answer(tmp_path / "shards", device_map="cpu") == expected


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
async def test_an_adapter_is_merged_into_the_weights(tiny_folder: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(str(tiny_folder), dtype=torch.float32)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(base, settings)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    found = await answer(tiny_folder, adapter=str(tmp_path / "adapter"))
    engine = TransformersEngine(str(tiny_folder))
    ids = torch.from_numpy((await engine.embed([Message("user", "Hi")])).token_ids)[None]
    await engine.aclose()
    with torch.inference_mode():
        out = adapted.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=2
        )
    assert list(found) == out[0, ids.shape[1] :].tolist()
    assert found != await answer(tiny_folder)


async def test_a_folder_without_an_adapter_and_a_revision_of_a_folder_are_refused(tiny_folder: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no adapter_config\.json"):
        await TransformersEngine(str(tiny_folder), adapter=str(tiny_folder)).load()
    with pytest.raises(ModelNotFoundError, match="there is no adapter"):
        await TransformersEngine(str(tiny_folder), adapter="nowhere").load()
    with pytest.raises(ConfigurationError, match="only a Hugging Face id has revisions"):
        await TransformersEngine(str(tiny_folder), revision="main").load()


MODELING = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


async def test_code_of_the_model_runs_only_where_that_is_asked_for(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.dynamic_module_utils as modules

    monkeypatch.setattr(modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = tmp_path / "own"
    shutil.copytree(tiny_folder, folder)
    (folder / "own_code.py").write_text(MODELING)
    config = json.loads((folder / "config.json").read_text())
    places = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own_llama", "auto_map": places}))
    with pytest.raises(ConfigurationError, match="brings code of its own; trust_remote_code=True runs it"):
        await answer(folder)
    assert await answer(folder, trust_remote_code=True) == await answer(tiny_folder)


QUANTISED = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "gptqmodel and optimum": {"quant_method": "gptq", "bits": 4},
    "gptqmodel": {"quant_method": "awq", "bits": 4},
    "compressed-tensors": {"quant_method": "compressed-tensors"},
}


@pytest.mark.parametrize("packages", QUANTISED)
def test_a_package_that_a_quantised_checkpoint_needs_is_named(packages: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    import tta_middleware.engines.decoding.loading as loading

    monkeypatch.setattr(loading, "_here", lambda _: False)
    config = SimpleNamespace(quantization_config=QUANTISED[packages])
    with pytest.raises(MissingExtraError, match=f"need {packages}, which is not installed; run: pip install"):
        loading.loading_arguments(config, loading.HowToLoad(), torch.device("cuda"))


def test_what_reaches_transformers_for_quantised_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, which is not at hand; what runs on a CPU is in test_quantised.py."""
    import torch

    import tta_middleware.engines.decoding.loading as loading

    monkeypatch.setattr(loading, "_here", lambda _: True)
    cuda, how = torch.device("cuda:1"), loading.HowToLoad(dtype="bfloat16")

    def arguments(method: dict[str, Any] | None, how: loading.HowToLoad = how, place: Any = cuda) -> dict[str, Any]:
        return loading.loading_arguments(SimpleNamespace(quantization_config=method), how, place)

    assert arguments(None) == {"dtype": torch.bfloat16, "use_safetensors": True}
    # Quantised weights are read where they are to stay.
    assert arguments(QUANTISED["gptqmodel and optimum"])["device_map"] == {"": "cuda:1"}
    assert "quantization_config" not in arguments(QUANTISED["gptqmodel"])
    assert arguments({"quant_method": "mxfp4"})["config"].quantization_config["dequantize"] is True
    assert "device_map" not in arguments({"quant_method": "mxfp4"})
    assert "config" not in arguments({"quant_method": "fp8"})
    on_a_cpu = arguments({"quant_method": "fp8"}, place=torch.device("cpu"))
    assert on_a_cpu["config"].quantization_config["dequantize"] is True
    spread = loading.HowToLoad(device_map={"": 0}, quantization="bnb-8bit")
    assert arguments(None, spread)["device_map"] == {"": 0}
    assert arguments(None, spread)["quantization_config"].load_in_8bit is True
    with pytest.raises(ConfigurationError, match="quantised already"):
        arguments(QUANTISED["gptqmodel"], spread)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"quantization": "int3"}, "quantization is bnb-4bit or bnb-8bit"),
        ({"device_map": "auto", "device": "cpu"}, "not both"),
        ({"path": "sideways"}, "path is auto, packed or plain"),
    ],
)
async def test_settings_that_cannot_be_are_refused(options: dict[str, Any], told: str, tiny_folder: Path) -> None:
    with pytest.raises(ConfigurationError, match=told):
        await TransformersEngine(str(tiny_folder), **options).load()


def test_a_table_that_is_not_numbers_is_looked_up() -> None:
    import torch

    from tta_middleware.engines.prompt.vocabulary import _dense_table

    class Quantised(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.arange(-8, 8, dtype=torch.int8).reshape(8, 2), requires_grad=False)

        def forward(self, ids: Any) -> Any:
            return self.weight[ids].float() * 0.5

    table = _dense_table(Quantised())
    assert table.dtype == torch.float32
    assert table[0].tolist() == [-4.0, -3.5]
    assert table.shape == (8, 2)


async def test_settings_reach_the_engine_from_the_chat_model_and_unknown_ones_are_refused(tiny_folder: Path) -> None:
    chat = TTAChatModel(model=str(tiny_folder), engine_options={"path": "plain", "max_batch": 3})
    engine = chat.runtime.engine(chat.model, **chat._loading)
    assert isinstance(engine, TransformersEngine)
    assert engine.max_batch == 3
    assert (await engine.way())[0] == "plain"
    await engine.aclose()
    with pytest.raises(ValueError, match="has no speed to set"):
        TTAChatModel(model=str(tiny_folder), engine_options={"speed": "high"})


def test_settings_are_read_from_a_command_line() -> None:
    read = engine_options(["path=plain", "max-batch=3", 'device_map={"": 0}', "trust_remote_code=true"])
    assert read == {"path": "plain", "max_batch": 3, "device_map": {"": 0}, "trust_remote_code": True}
    assert engine_options(None) == {}
    with pytest.raises(ConfigurationError, match="NAME=VALUE"):
        engine_options(["path"])
