"""A loaded model with everything the decoder needs to know about it."""

from __future__ import annotations

import inspect
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from tta_middleware.engines.packing import can_pack, pack_linear_layers
from tta_middleware.engines.torch_import import quiet_transformers
from tta_middleware.engines.vocabulary import Vocabulary
from tta_middleware.errors import ConfigurationError, EngineError, ModelNotFoundError
from tta_middleware.types import FloatMatrix

# Sliding-window layers are kept whole and limited by the mask alone, so they merge like full ones.
_MERGEABLE_LAYERS = {"full_attention", "sliding_attention"}


class LoadedModel(Vocabulary):
    """Weights, tokenizer and facts of one decoder-only model; shared by threads, read only."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        config = model.config.get_text_config(decoder=True)
        _check_supported(model.config, config)
        context: int | None = getattr(config, "max_position_embeddings", None)
        super().__init__(tokenizer, model.get_input_embeddings(), _eos_ids(model, tokenizer), context)
        self.model = model.eval().requires_grad_(False)
        self._arguments = inspect.signature(model.forward).parameters
        # Some families keep state in modules while they run (Phi's long rotary embedding), and two forward
        # passes at once would only compete for the same cores.
        self._lock = threading.Lock()

    def forward(
        self, embeds: Tensor, *, mask: Tensor | None, positions: Tensor, cache: Any = None, keep: int = 1
    ) -> Tensor:
        """Logits (B, keep, V) of the last ``keep`` columns of (B, T, d) embeddings."""
        arguments: dict[str, Any] = {"position_ids": positions, "logits_to_keep": keep}
        known = {name: value for name, value in arguments.items() if name in self._arguments}
        with self._lock, torch.inference_mode():
            output = self.model(
                inputs_embeds=embeds,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=cache is not None,
                **known,
            )
        logits: Tensor = output.logits
        return logits[:, -keep:]

    def to_tensor(self, matrix: FloatMatrix) -> Tensor:
        """(T, d) embeddings in the model's type, on its device."""
        return torch.from_numpy(np.ascontiguousarray(matrix)).to(self.device, self.dtype)


def load_model(folder: Path, *, device: str, dtype: str) -> LoadedModel:
    """Load a local folder; never touches the network.

    Raises:
        ConfigurationError: device or dtype is unknown, or the architecture cannot be decoded from embeddings.
        ModelNotFoundError: the folder lacks files.
        EngineError: the files cannot be read.
    """
    place = pick_device(device)
    kind = pick_dtype(dtype, place)
    with quiet_transformers():
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=kind, local_files_only=True, use_safetensors=True
            )
        except OSError as exc:
            raise ModelNotFoundError(f"the model folder {folder.name!r} is incomplete: {exc}") from exc
        except (ValueError, RuntimeError, KeyError) as exc:
            raise EngineError(f"the model in {folder.name!r} could not be loaded: {exc}") from exc
    loaded = LoadedModel(model.to(place), tokenizer)
    if can_pack(loaded.device, loaded.dtype):
        pack_linear_layers(loaded.model)
    # The first call settles the tokenizer's truncation state, which must not change under a concurrent reader.
    tokenizer("warm", add_special_tokens=False)
    return loaded


def pick_device(device: str) -> torch.device:
    """``auto`` is the first CUDA device, or the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device)
    except RuntimeError as exc:
        raise ConfigurationError(f"unknown device {device!r}; use auto, cpu, cuda or cuda:0") from exc


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 where the hardware multiplies it, else float32.

    32 tokens of SmolLM2 at 1, 8 and 16 rows cost 1.55, 2.06 and 2.40 CPU seconds in bfloat16 on a processor with
    AMX, and 1.94, 4.55 and 5.63 in float32 (benchmarks/engine_decode.py).
    """
    if dtype == "auto":
        return torch.bfloat16 if _fast_bfloat16(device) else torch.float32
    chosen = getattr(torch, dtype, None)
    if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
        raise ConfigurationError(f"unknown dtype {dtype!r}; use auto, float32, bfloat16, float16 or float64")
    return chosen


def _fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, check, bool)() for check in checks)


def _check_supported(config: Any, text_config: Any) -> None:
    kinds = set(getattr(text_config, "layer_types", None) or ()) - _MERGEABLE_LAYERS
    if kinds:
        raise ConfigurationError(f"models with {', '.join(sorted(kinds))} layers cannot be batched here")
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigurationError("encoder-decoder models are not supported; use a decoder-only chat model")
    if getattr(text_config, "num_kv_shared_layers", None) or getattr(text_config, "hidden_size_per_layer_input", None):
        raise ConfigurationError("this model needs token ids next to embeddings (Gemma 3n style); not supported")


def _eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    found: set[int] = set()
    for ids in (getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id):
        if ids is not None:
            found.update(ids if isinstance(ids, list | tuple) else [ids])
    return frozenset(int(token_id) for token_id in found)
