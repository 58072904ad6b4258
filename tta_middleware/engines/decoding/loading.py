"""Loads a model folder the way it is asked for: device maps, quantised checkpoints, adapters, a model's own code."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

from tta_middleware.engines.decoding.loaded import LoadedModel
from tta_middleware.engines.decoding.path import prepared
from tta_middleware.engines.models import ADAPTER_WEIGHTS
from tta_middleware.engines.reading import told
from tta_middleware.engines.torch_import import quiet_transformers
from tta_middleware.errors import ConfigurationError, MissingExtraError, ModelNotFoundError

# An adapter that was trained with a tokenizer or a chat template of its own brings them along.
_TOKENIZER = "tokenizer_config.json"

# What reads checkpoints of a quantisation method: modules, and the packages that bring them.
_READERS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "bitsandbytes": (("bitsandbytes", "bitsandbytes"),),
    "gptq": (("gptqmodel", "gptqmodel"), ("optimum", "optimum")),
    "awq": (("gptqmodel", "gptqmodel"),),
    "compressed-tensors": (("compressed_tensors", "compressed-tensors"),),
    "torchao": (("torchao", "torchao"),),
    "hqq": (("hqq", "hqq"),),
    "quanto": (("optimum.quanto", "optimum-quanto"),),
    "aqlm": (("aqlm", "aqlm"),),
    "fp8": (),
}
_WHOLE_ON_A_CPU = ("compressed-tensors", "fp8")
_ON_THE_FLY: Mapping[str, Mapping[str, Any]] = {
    "bnb-4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "bnb-8bit": {"load_in_8bit": True},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HowToLoad:
    """How a model is to be loaded.

    Attributes:
        device: ``auto`` or a torch device; not beside a device map.
        dtype: ``auto`` or a torch floating type.
        path: which way it is to run; see :mod:`.path`.
        device_map: as transformers takes it, ``auto`` say: layers may lie on several devices.
        quantization: ``bnb-4bit`` or ``bnb-8bit`` quantises while loading.
        adapter: folder of a PEFT adapter that is merged into the weights.
        trust_remote_code: run code that comes with the model.
        weights: how linear layers keep theirs on a CPU: ``auto``, ``loaded`` or ``float16``.
    """

    device: str = "auto"
    dtype: str = "auto"
    path: str = "auto"
    device_map: str | Mapping[str, Any] | None = None
    quantization: str | None = None
    adapter: Path | None = None
    trust_remote_code: bool = False
    weights: str = "auto"

    def __post_init__(self) -> None:
        if self.quantization is not None and self.quantization not in _ON_THE_FLY:
            raise ConfigurationError(f"quantization is {' or '.join(_ON_THE_FLY)}, not {self.quantization!r}")
        if self.device_map is not None and self.device != "auto":
            raise ConfigurationError("give a device or a device_map, not both")

    @property
    def keeps(self) -> str:
        """How weights are kept: whoever names a type gets that type."""
        return "loaded" if self.weights == "auto" and self.dtype != "auto" else self.weights


def load_model(folder: Path, how: HowToLoad) -> LoadedModel:
    """Load a local folder; never touches the network.

    Raises:
        ConfigurationError: a setting is unknown, or the architecture cannot be decoded from embeddings.
        MissingExtraError: a package is missing that the checkpoint or a setting needs; the message names it.
        ModelNotFoundError: the folder lacks files, or its files weights.
        EngineError: the files cannot be read.
    """
    place = torch.device("cpu") if how.device_map is not None else pick_device(how.device)
    common = {"local_files_only": True, "trust_remote_code": how.trust_remote_code}
    with quiet_transformers(), told(folder):
        config = transformers.AutoConfig.from_pretrained(str(folder), **common)
        auto = _auto_class(config)
        arguments = loading_arguments(config, how, place)
    words = how.adapter if how.adapter is not None and (how.adapter / _TOKENIZER).is_file() else folder
    with quiet_transformers(), told(words, "tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(words), **common)
    with quiet_transformers(), told(folder):
        model, found = auto.from_pretrained(str(folder), output_loading_info=True, **common, **arguments)
        if how.quantization is None and _method(config) is None:
            # Which parts a quantised layer consists of is known to its package alone.
            _check_all_found(model, found["missing_keys"])
        if "device_map" not in arguments:
            model = model.to(place)
    if how.adapter is not None:
        with quiet_transformers(), told(how.adapter, "adapter"):
            model = _adapted(model, how.adapter)
    loaded = prepared(model, tokenizer, path=how.path, weights=how.keeps)
    # The first call settles the tokenizer's truncation state, which must not change under a concurrent reader.
    tokenizer("warm", add_special_tokens=False)
    return loaded


def loading_arguments(config: Any, how: HowToLoad, place: torch.device) -> dict[str, Any]:
    """What ``from_pretrained`` is given for a model of this config.

    Raises:
        MissingExtraError: a package is missing that this needs.
    """
    # Weights in float16 are multiplied in float32.
    dtype = "float32" if how.dtype == "auto" and how.weights == "float16" else how.dtype
    arguments: dict[str, Any] = {"dtype": pick_dtype(dtype, place), "use_safetensors": True}
    method = _method(config)
    if how.quantization is not None:
        if method is not None:
            raise ConfigurationError(f"the checkpoint is quantised already ({method}); leave quantization out")
        _need("bitsandbytes")
        arguments["quantization_config"] = transformers.BitsAndBytesConfig(
            **_ON_THE_FLY[how.quantization], **_computing(how.quantization, arguments["dtype"])
        )
    elif method is not None:
        _need(method)
        # MXFP4's kernels would come from the hub; in the model's own type the weights run everywhere.
        if method == "mxfp4" or (method in _WHOLE_ON_A_CPU and place.type == "cpu"):
            arguments["config"] = _made_whole(config)
    if how.device_map is not None:
        arguments["device_map"] = how.device_map if isinstance(how.device_map, str) else dict(how.device_map)
    elif method in _READERS or how.quantization is not None:
        # Quantised weights cannot be moved once they are loaded.
        arguments["device_map"] = {"": str(place)}
    if "device_map" in arguments and not _here("accelerate"):
        raise MissingExtraError("a device map needs accelerate, which is not installed; run: pip install accelerate")
    return arguments


def _auto_class(config: Any) -> Any:
    """What of transformers reads a model of this config; of models that see images, too, the text is written.

    Raises:
        ConfigurationError: it writes no text, or reads the prompt by another part than it writes with.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigurationError("encoder-decoder models are not supported; use a decoder-only chat model")
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in _own_code(config):
        return transformers.AutoModelForCausalLM
    if type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return transformers.AutoModelForImageTextToText
    raise ConfigurationError(f"models of the type {config.model_type!r} write no text; use a decoder-only chat model")


def _own_code(config: Any) -> Mapping[str, Any]:
    return getattr(config, "auto_map", None) or {}


def _check_all_found(model: Any, missing: Collection[str]) -> None:
    """transformers leaves weights that no file has as they were drawn, and says so in its log alone.

    Raises:
        ModelNotFoundError: there are such weights.
    """
    lacking = sorted(name for name, _ in model.named_parameters() if name in missing)
    if lacking:
        raise ModelNotFoundError(
            f"the files lack {len(lacking)} of the model's weights ({', '.join(lacking[:3])}), which would be random; "
            "they are incomplete, or of a model without the layer that writes text: take those of a chat model"
        )


def _made_whole(config: Any) -> Any:
    """The same config; the weights become numbers of the model's own type as they are loaded.

    It is said in the config, since transformers warns whoever gives a second one beside the checkpoint's own.
    """
    changed = copy.deepcopy(config)
    found = changed.quantization_config
    if isinstance(found, Mapping):
        changed.quantization_config = {**found, "dequantize": True}
    else:
        found.dequantize = True
    return changed


def _computing(quantization: str, dtype: torch.dtype) -> dict[str, Any]:
    return {"bnb_4bit_compute_dtype": dtype} if quantization == "bnb-4bit" else {}


def _method(config: Any) -> str | None:
    found = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, Mapping) else getattr(found, "quant_method", None)
    if method is None and isinstance(found, Mapping) and any(found.get(f"load_in_{bits}bit") for bits in (4, 8)):
        return "bitsandbytes"
    return None if method is None else str(getattr(method, "value", method)).replace("_", "-")


def _need(method: str) -> None:
    missing = [package for module, package in _READERS.get(method, ()) if not _here(module)]
    if missing:
        raise MissingExtraError(
            f"weights quantised by {method} need {' and '.join(missing)}, which is not installed; "
            f"run: pip install {' '.join(missing)}"
        )


def _here(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _adapted(model: Any, adapter: Path) -> Any:
    """The model with an adapter, merged into its weights where they can be added to.

    Raises:
        MissingExtraError: peft is not installed.
        ConfigurationError: it was made for another model.
    """
    if not _here("peft"):
        raise MissingExtraError(
            'an adapter needs peft, which is not installed; run: pip install "tta-middleware[adapters]"'
        )
    from peft import PeftModel, get_peft_model_state_dict

    _make_room(model, adapter)
    with_adapter = PeftModel.from_pretrained(model, str(adapter))
    if not hasattr(with_adapter.base_model, "merge_and_unload"):
        kind = with_adapter.active_peft_config.peft_type.value
        raise ConfigurationError(f"an adapter of the kind {kind} is no change of weights; merge another, LoRA say")
    # Whether the embeddings were changed peft would ask the hub.
    _check_all_taken(adapter, get_peft_model_state_dict(with_adapter, save_embedding_layers=False))
    _untie_what_is_changed(with_adapter.base_model.model)
    return with_adapter.merge_and_unload()


def _make_room(model: Any, adapter: Path) -> None:
    """Give the model rows for the tokens that were added when the adapter was trained; the adapter brings theirs."""
    [name] = [name for name, module in model.named_modules() if module is model.get_input_embeddings()]
    with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as weights:
        saved = [key for key in weights.keys() if key.endswith(f"{name}.weight")]  # noqa: SIM118
        rows = weights.get_slice(saved[0]).get_shape()[0] if saved else 0
    if rows > len(model.get_input_embeddings().weight):
        model.resize_token_embeddings(rows, mean_resizing=False)


def _untie_what_is_changed(model: Any) -> None:
    """Let input and output embeddings go apart where the adapter changes one: merged, it would change both."""
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    bases = [getattr(module, "base_layer", module) for module in (first, last)]
    layered = any(hasattr(module, "lora_A") for module in (first, last))
    if layered and bases[0].weight is bases[1].weight:
        bases[1].weight = torch.nn.Parameter(bases[0].weight.detach().clone(), requires_grad=False)
        model.config.get_text_config(decoder=True).tie_word_embeddings = False


def _check_all_taken(adapter: Path, taken: Collection[str]) -> None:
    """peft leaves out what of an adapter it finds no layer for, and says nothing."""
    with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as weights:
        left = sorted(name for name in weights.keys() if ".lora_" in name and name not in taken)  # noqa: SIM118
    if left:
        raise ConfigurationError(
            f"the adapter in {adapter.name!r} is for a model with other layers: this one lacks {len(left)} of those "
            f"that it changes ({left[0]}); name the model that it was made for"
        )


def pick_device(device: str) -> torch.device:
    """``auto`` is the first CUDA device, Apple's GPU, or the CPU."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as exc:
        raise ConfigurationError(f"unknown device {device!r}; use auto, cpu, cuda, cuda:0 or mps") from exc
    try:
        torch.empty(0, device=place)
    except (AssertionError, RuntimeError) as exc:
        raise ConfigurationError(f"torch finds no device {device!r} on this machine; use auto or cpu") from exc
    return place


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 where the hardware multiplies it, else float32.

    32 tokens of SmolLM2 at 1, 8 and 16 rows cost 1.55, 2.06 and 2.40 CPU seconds in bfloat16 on a processor with
    AMX, and 1.94, 4.55 and 5.63 in float32 (benchmarks/engine_decode.py).
    """
    if dtype == "auto":
        return torch.bfloat16 if _fast_bfloat16(device) else torch.float32
    chosen = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
        raise ConfigurationError(f"unknown dtype {dtype!r}; use auto, float32, bfloat16, float16 or float64")
    return chosen


def _fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, check, bool)() for check in checks)
