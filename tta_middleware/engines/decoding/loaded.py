"""A loaded model with everything the decoder needs to know about it, whichever way it runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from tta_middleware.engines.decoding.beside import Segment
from tta_middleware.engines.decoding.columns import Layout
from tta_middleware.engines.decoding.flash import Flash
from tta_middleware.engines.decoding.kv_slots import KVSlots, column_bytes
from tta_middleware.engines.decoding.packed import NAME, Pass, running
from tta_middleware.engines.decoding.recorded import Recorder, steady_kernels
from tta_middleware.engines.decoding.rotary import TwoRanges, short_range, take_two_ranges
from tta_middleware.engines.decoding.sight import Sight
from tta_middleware.engines.prompt.vocabulary import Vocabulary
from tta_middleware.errors import EngineError
from tta_middleware.types import PromptEmbeddings


class LoadedModel(Vocabulary):
    """Weights, tokenizer and facts of one decoder-only model; only the decode thread runs it.

    A column is what the model is given of one place of a sequence: its embedding row, and behind it the rows that
    families with inputs per layer (Gemma 3n, Gemma 4) look up for its token. A repair moves the former alone.

    Attributes:
        path: how it runs: ``packed`` with others in one pass, or ``plain`` by its own cache.
        why: why that way, as a part of a sentence.
        steady: the number of threads changes no bit of what it computes.
        column_bytes: what one column of one sequence keeps, over all layers.
        layers: how many there are.
        short_range: columns up to which a sequence keeps its first rotary frequencies; None if for ever.
    """

    path: Literal["packed", "plain"] = "plain"

    def __init__(self, model: Any, tokenizer: Any, why: str) -> None:
        config = model.config.get_text_config(decoder=True)
        context: int | None = getattr(config, "max_position_embeddings", None)
        super().__init__(tokenizer, model.get_input_embeddings(), _eos_ids(model, tokenizer), context)
        self.model = model.eval().requires_grad_(False)
        self.why = why
        self.steady = False
        self.column_bytes = 0
        self.short_range = short_range(config)
        self._arguments = inspect.signature(model.forward).parameters
        self.layers: int = config.num_hidden_layers
        self._per_layer = _per_layer_inputs(model, config)

    def describe(self) -> str:
        """Why it runs the way it does, in a line."""
        return self.why

    def columns(self, prompt: PromptEmbeddings) -> Tensor:
        """(T, c) columns of a prompt in the model's type, on its device."""
        return self.columns_of([prompt])[0]

    def columns_of(self, prompts: Sequence[PromptEmbeddings]) -> list[Tensor]:
        """The same of several prompts, which are copied there at once."""
        matrices = [prompt.matrix for prompt in prompts]
        together = np.ascontiguousarray(matrices[0]) if len(prompts) == 1 else np.concatenate(matrices)
        rows = torch.from_numpy(together).to(self.device, self.dtype)
        columns = self._with_layers(rows, [token_id for prompt in prompts for token_id in prompt.token_ids.tolist()])
        return list(torch.split(columns, [len(matrix) for matrix in matrices]))

    def token_columns(self, token_ids: Sequence[int]) -> Tensor:
        """(n, c) columns of tokens."""
        return self._with_layers(self.look_up(token_ids), token_ids)

    def whole(self, columns: Tensor) -> Tensor:
        """(T, V) logits of the (T, c) columns of one sequence, in one pass of the model's own and without a cache."""
        arguments: dict[str, Any] = {**self._inputs(columns[None])}
        if "use_cache" in self._arguments:
            arguments["use_cache"] = False
        if "logits_to_keep" in self._arguments:
            # As numbers of columns: for "all" Gemma 4 cuts its masks, which are to be recognised.
            arguments["logits_to_keep"] = torch.arange(len(columns), device=columns.device)
        with torch.inference_mode():
            logits: Tensor = self.model(**arguments).logits[0]
        return logits

    def _with_layers(self, rows: Tensor, token_ids: Sequence[int]) -> Tensor:
        if self._per_layer is None:
            return rows
        with torch.inference_mode():
            ids = torch.tensor(token_ids, dtype=torch.long, device=self.device)
            extra = self._per_layer(ids[None])[0].flatten(1)
            return torch.cat([rows, extra.to(rows)], dim=1)

    def _inputs(self, columns: Tensor) -> dict[str, Tensor]:
        """What the model takes for (B, T, c) columns."""
        given = {"inputs_embeds": columns[..., : self.width]}
        if self._per_layer is not None:
            given["per_layer_inputs"] = columns[..., self.width :].reshape(*columns.shape[:2], self.layers, -1)
        return given

    @contextmanager
    def _noting_states(self, note: Callable[[int, Tensor], object], read: Collection[int]) -> Iterator[None]:
        """Show the (B, T, d) states after each of these layers; of the last one, what the output embedding is given."""
        hooks = [self._hook(layer, partial(note, layer)) for layer in read]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, layer: int, show: Callable[[Tensor], object]) -> RemovableHandle:
        if layer == self.layers:
            head: torch.nn.Module = self.model.get_output_embeddings()
            return head.register_forward_pre_hook(lambda _head, given: _shown(show, given))
        return self._blocks()[layer - 1].register_forward_hook(lambda _block, _given, out: _shown(show, out))

    def _blocks(self) -> torch.nn.ModuleList:
        """The decoder's layers: the first list of as many modules as it has layers; what sees images has its own."""
        for module in self.model.get_decoder().modules():
            if isinstance(module, torch.nn.ModuleList) and len(module) == self.layers:
                return module
        raise EngineError("this model's layers are not a list of modules, so none but the last can be read")


class PackedModel(LoadedModel):
    """A model whose attention lets sequences lie side by side in one pass.

    Args:
        sights: what each layer sees.

    Attributes:
        recorder: replays decode steps, on CUDA devices; else None.
    """

    path = "packed"

    def __init__(self, model: Any, tokenizer: Any, sights: dict[int, Sight], why: str = "") -> None:
        super().__init__(model, tokenizer, why)
        self._sights = sights
        self._layout: Layout | None = None
        self._flash = Flash() if self.device.type == "cuda" else None
        self._rotary: list[TwoRanges] = take_two_ranges(self.model, self.short_range) if self.short_range else []
        self.recorder = Recorder(self.compute) if self.device.type == "cuda" else None
        self.model.set_attn_implementation(NAME)

    def forward(self, columns: Tensor, packed: Pass) -> Tensor:
        """Logits (K, V) of the columns that ``packed`` keeps, of (1, T, c) columns; replayed where recorded.

        The logits are to be read before the next pass.

        Raises:
            EngineError: a layer's attention did not come to the pass.
        """
        replayed = self.recorder.step(columns, packed) if self.recorder is not None else None
        return self.compute(columns, packed) if replayed is None else replayed

    def compute(self, columns: Tensor, packed: Pass) -> Tensor:
        """The same, layer by layer."""
        packed.sights, packed.layout, packed.flash = self._sights, self._layout, self._flash
        kept = packed.kept(self.device)
        arguments: dict[str, Any] = {"position_ids": packed.positions(self.device)}
        trims = "logits_to_keep" in self._arguments
        if trims:
            arguments["logits_to_keep"] = kept
        for rotary in self._rotary:
            rotary.beyond = packed.beyond(self.short_range or 0, self.device)

        def note(layer: int, given: Tensor) -> None:
            # Only the output embedding is given the kept columns alone.
            packed.note_states(layer, given[0] if trims and layer == self.layers else given[0][kept])

        noting = self._noting_states(note, packed.read_layers)
        with torch.inference_mode(), steady_kernels(self.device), noting, running(packed):
            logits: Tensor = self.model(**self._inputs(columns), use_cache=False, **arguments).logits[0]
            if packed.layers_run != self.layers:
                raise EngineError("not every layer of this model computes attention where sequences are kept apart")
            self._layout = packed.done()
        return logits if trims else logits[kept]

    def leave(self) -> None:
        """Take back what was changed of the model, apart from its attention."""
        for module in list(self.model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, TwoRanges):
                    setattr(module, name, child.rotary)

    def measure(self) -> None:
        """Run two tokens, to see what a column takes."""
        segment = Segment(self.token_columns([0, 0]), None, keep=1)
        self.forward(segment.rows[None], Pass(KVSlots(0), [segment]))
        self.column_bytes = column_bytes(segment.prefix())


def _shown(show: Callable[[Tensor], object], given: Any) -> None:
    state: Tensor = given if isinstance(given, Tensor) else given[0]
    if state.dim() != 3:
        raise EngineError("this model's layers pass several states on side by side, so none but the last can be read")
    show(state)


def _per_layer_inputs(model: Any, config: Any) -> Callable[[Tensor], Tensor] | None:
    """What looks (B, T) token ids up for every layer: (B, T, layers, n); None where only embeddings go in."""
    if not getattr(config, "hidden_size_per_layer_input", None):
        return None
    found = [module for module in model.modules() if hasattr(module, "embed_tokens_per_layer")]
    look_up: Callable[[Tensor], Tensor] = found[-1].get_per_layer_inputs
    return look_up


def _eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    found: set[int] = set()
    for ids in (getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id):
        if ids is not None:
            found.update(ids if isinstance(ids, list | tuple) else [ids])
    return frozenset(int(token_id) for token_id in found)
