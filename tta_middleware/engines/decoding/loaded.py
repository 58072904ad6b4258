"""A loaded model with everything the decoder needs to know about it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from tta_middleware.engines.decoding.kv_slots import KVSlots, column_bytes
from tta_middleware.engines.decoding.packed import NAME, Pass, Segment
from tta_middleware.engines.decoding.packing import can_pack, pack_linear_layers
from tta_middleware.engines.decoding.recorded import Recorder, steady_kernels
from tta_middleware.engines.prompt.vocabulary import Vocabulary
from tta_middleware.engines.torch_import import quiet_transformers
from tta_middleware.errors import ConfigurationError, EngineError, ModelNotFoundError
from tta_middleware.types import FloatMatrix

# Sliding-window layers are kept whole and limited by the mask alone, so they merge like full ones.
_MERGEABLE_LAYERS = {"full_attention", "sliding_attention"}


class LoadedModel(Vocabulary):
    """Weights, tokenizer and facts of one decoder-only model; only the decode thread runs it.

    Attributes:
        packed_weights: the linear layers keep their weights in the layout that the processor multiplies.
        column_bytes: keys and values of one column of one sequence, over all layers.
        recorder: replays decode steps, on CUDA devices; else None.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        config = model.config.get_text_config(decoder=True)
        _check_supported(model.config, config)
        context: int | None = getattr(config, "max_position_embeddings", None)
        super().__init__(tokenizer, model.get_input_embeddings(), _eos_ids(model, tokenizer), context)
        self.model = model.eval().requires_grad_(False)
        self._arguments = inspect.signature(model.forward).parameters
        self._layers: int = config.num_hidden_layers
        self.packed_weights = False
        self.column_bytes = 0
        self.recorder = Recorder(self.compute) if self.device.type == "cuda" else None

    def forward(self, rows: Tensor, packed: Pass) -> Tensor:
        """Logits (K, V) of the columns that ``packed`` keeps, of (1, T, d) embeddings; replayed where recorded.

        The logits are to be read before the next pass.

        Raises:
            EngineError: a layer's attention did not come to the pass.
        """
        replayed = self.recorder.step(rows, packed) if self.recorder is not None else None
        return self.compute(rows, packed) if replayed is None else replayed

    def compute(self, rows: Tensor, packed: Pass) -> Tensor:
        """The same, layer by layer."""
        kept = packed.kept(self.device)
        arguments: dict[str, Any] = {"position_ids": packed.positions(self.device), "packed": packed}
        if trims := "logits_to_keep" in self._arguments:
            arguments["logits_to_keep"] = kept
        noting = self._noting_states(packed, None if trims else kept)
        with torch.inference_mode(), steady_kernels(self.device), noting:
            logits: Tensor = self.model(inputs_embeds=rows, use_cache=False, **arguments).logits[0]
        if packed.layers_run != self._layers:
            raise EngineError("not every layer of this model computes attention where sequences are kept apart")
        return logits if trims else logits[kept]

    @contextmanager
    def _noting_states(self, packed: Pass, kept: Tensor | None) -> Iterator[None]:
        """What the output embedding is given goes to the pass, if that wants it; ``kept`` picks its columns."""
        if not packed.wants_states:
            yield
            return

        def note(_head: Any, given: tuple[Tensor, ...]) -> None:
            packed.note_states(given[0][0] if kept is None else given[0][0][kept])

        hook = self.model.get_output_embeddings().register_forward_pre_hook(note)
        try:
            yield
        finally:
            hook.remove()

    def probe(self) -> None:
        """Run two tokens, to see that the family can be batched and what a column takes.

        Raises:
            ConfigurationError: it cannot.
        """
        segment = Segment(self.look_up([0, 0]), None, keep=1)
        try:
            self.forward(segment.rows[None], Pass(KVSlots(0), [segment]))
        except (EngineError, TypeError, ValueError, AttributeError) as exc:
            raise ConfigurationError(f"models of this kind cannot be batched here: {exc}") from exc
        self.column_bytes = column_bytes(segment.prefix())

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
        loaded.packed_weights = True
    loaded.model.set_attn_implementation(NAME)
    loaded.probe()
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
