"""Loads a model folder the way it is asked for."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from tta_middleware.engines.decoding.loaded import LoadedModel
from tta_middleware.engines.decoding.path import prepared
from tta_middleware.engines.torch_import import quiet_transformers
from tta_middleware.errors import ConfigurationError, EngineError, ModelNotFoundError


def load_model(folder: Path, *, device: str, dtype: str, path: str = "auto") -> LoadedModel:
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
    loaded = prepared(model.to(place), tokenizer, path=path)
    # The first call settles the tokenizer's truncation state, which must not change under a concurrent reader.
    tokenizer("warm", add_special_tokens=False)
    return loaded


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
    chosen = getattr(torch, dtype, None)
    if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
        raise ConfigurationError(f"unknown dtype {dtype!r}; use auto, float32, bfloat16, float16 or float64")
    return chosen


def _fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, check, bool)() for check in checks)
