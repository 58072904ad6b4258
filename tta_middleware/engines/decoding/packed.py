"""One forward pass over tokens of many sequences, laid side by side without padding.

The linear layers see one long row of tokens; only attention knows which token belongs to which sequence. So prompts
that join, answers that are scored and sequences that decode share a pass. transformers calls the attention function of
this module by name, which is how it lets serving engines bring their own (AttentionInterface).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from tta_middleware.engines.decoding.attention import AttentionSettings, bias_of
from tta_middleware.engines.decoding.beside import Beside, Segment
from tta_middleware.engines.decoding.columns import Layout
from tta_middleware.engines.decoding.flash import Flash
from tta_middleware.engines.decoding.kv_slots import KVSlots, Shape
from tta_middleware.engines.decoding.sight import Sight
from tta_middleware.errors import EngineError

NAME = "tta_packed"


class Pass:
    """What one forward pass runs: one new column for every slot, then segments.

    Args:
        slots: the sequences that decode, with room reserved; empty where only segments run.
        segments: columns of sequences that join or are scored.

    Attributes:
        layers_run: layers whose attention came here; a model that bypasses it would compute nonsense.
        sights: what each layer sees; set by the model.
        layout: how the model's keys and values lie; set by the model. None while that is to be found out, by one
            segment without a past.
        flash: the kernel that takes all segments; None where each is computed by itself. Set by the model.
    """

    def __init__(self, slots: KVSlots, segments: Sequence[Segment]) -> None:
        self.layers_run = 0
        self.slots = slots
        self.sights: Mapping[int, Sight] = {}
        self.layout: Layout | None = None
        self.flash: Flash | None = None
        self._lengths, self._segments = slots.step_lengths, segments
        self._biases: dict[tuple[Sight, int], Tensor | None] = {}
        self._beside: Beside | None = None

    @property
    def only_decodes(self) -> bool:
        """Whether nothing runs beside the slots."""
        return bool(self._lengths) and not self._segments

    def positions(self, device: torch.device) -> Tensor:
        """(1, T) place of every column in its sequence."""
        places = list(self._lengths)
        for segment in self._segments:
            places += range(segment.start, segment.end)
        return torch.tensor([places], device=device)

    def beyond(self, limit: int, device: torch.device) -> Tensor | None:
        """(1, T) whether a column's sequence has more than ``limit`` columns; None if none has."""
        long = [length >= limit for length in self._lengths]
        for segment in self._segments:
            long += [segment.long] * segment.count
        return torch.tensor([long], device=device) if any(long) else None

    def kept(self, device: torch.device) -> Tensor:
        """Indices of the columns whose logits are wanted, slots first."""
        end = len(self._lengths)
        wanted = list(range(end))
        for segment in self._segments:
            end += segment.count
            wanted += range(end - segment.keep, end)
        return torch.tensor(wanted, dtype=torch.long, device=device)

    @property
    def read_layers(self) -> frozenset[int]:
        """Layers whose states some segment wants."""
        return frozenset(at for segment in self._segments if not segment.read_spans for at in segment.read_layers)

    def note_states(self, layer: int, states: Tensor) -> None:
        """Hand the (K, d) states of the kept columns after a layer to the segments that want theirs."""
        at = len(self._lengths)
        for segment in self._segments:
            if layer in segment.read_layers and not segment.read_spans:
                segment.states[layer] = states[at : at + segment.keep]
            at += segment.keep

    def attend(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, settings: AttentionSettings) -> Tensor:
        """(1, T, H, D) for (1, H, T, D) queries; keys and values may have fewer heads."""
        self.layers_run += 1
        at = len(self._lengths)
        parts = [self._decode(layer, query, keys, values, settings)] if at else []
        if self._segments:
            self._beside = self._beside or Beside(self._segments, self.layout, self.flash)
            parts.append(self._beside.attend(layer, query[:, :, at:], keys[:, :, at:], values[:, :, at:], settings))
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[None]

    def done(self) -> Layout | None:
        """Give the segments what they have left, once all layers have run; how it lies."""
        return self.layout if self._beside is None else self._beside.done()

    def _decode(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, settings: AttentionSettings) -> Tensor:
        count, at, parts = len(self._lengths), 0, []
        new_keys, new_values = (new[0, :, :count].transpose(0, 1) for new in (keys, values))
        for all_keys, all_values in self.slots.write(layer, new_keys, new_values):
            mine = slice(at, at + len(all_keys))
            at = mine.stop
            # Query heads that share a key head become rows of one product, so no key is copied for them.
            folded = query[0, :, mine].transpose(0, 1).reshape(len(all_keys), all_keys.shape[1], -1, query.shape[-1])
            out = settings.attention(folded, all_keys, all_values, self._bias(settings.sight, query, mine, all_keys))
            parts.append(out.reshape(len(all_keys), query.shape[1], -1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _bias(self, sight: Sight, like: Tensor, mine: slice, keys: Tensor) -> Tensor | None:
        """What the queries of one group, the slice ``mine`` of a step, see of its keys."""
        if (sight, mine.start) not in self._biases:
            lengths = self._lengths[mine]
            if min(lengths) == max(lengths) and sight.sees_all_before(lengths[0]):
                self._biases[sight, mine.start] = None
            else:
                newest = torch.tensor(lengths, device=like.device)
                self._biases[sight, mine.start] = _step_bias(sight, newest, keys.shape[2], like)
        return self._biases[sight, mine.start]


class AnyStep(Pass):
    """A decode step whose lengths stand in a tensor, so that what is computed does not depend on them.

    Args:
        slots: the sequences that decode.
        lengths: (n,) of the first slots of each group; where fewer are taken, 0 for the others, whose columns mean
            nothing.
        shape: how many slots of each group, and how many columns each sees, at least the longest's and the new one.
    """

    def __init__(self, slots: KVSlots, lengths: Tensor, shape: Shape) -> None:
        super().__init__(slots, ())
        self._lengths = [0] * len(lengths)
        self._newest = lengths
        slots.place(lengths, shape)

    def positions(self, device: torch.device) -> Tensor:
        return self._newest[None].to(device)

    def beyond(self, limit: int, device: torch.device) -> Tensor | None:
        return (self._newest >= limit)[None].to(device)

    def kept(self, device: torch.device) -> Tensor:
        return torch.arange(len(self._newest), device=device)

    def _bias(self, sight: Sight, like: Tensor, mine: slice, keys: Tensor) -> Tensor | None:
        if (sight, mine.start) not in self._biases:
            self._biases[sight, mine.start] = _step_bias(sight, self._newest[mine], keys.shape[2], like)
        return self._biases[sight, mine.start]


def _step_bias(sight: Sight, newest: Tensor, columns: int, like: Tensor) -> Tensor:
    """(n, 1, 1, columns) for queries at the (n,) places ``newest``."""
    places = torch.arange(columns, device=like.device)[None]
    return bias_of(sight.seen(places, newest[:, None]), like)[:, None, None]


class _Current(threading.local):
    """The pass that this thread runs. Families hand some arguments on to attention and lose others."""

    packed: Pass | None = None


_current = _Current()


@contextmanager
def running(packed: Pass) -> Iterator[None]:
    """Let attention in this thread go to ``packed``."""
    _current.packed = packed
    try:
        yield
    finally:
        _current.packed = None


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_rest: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in every layer."""
    packed = _current.packed
    if packed is None:
        raise EngineError("this model computes attention outside of a packed pass; it cannot be batched here")
    layer: int = module.layer_idx
    settings = AttentionSettings(scaling, softcap, packed.sights[layer], s_aux)
    return packed.attend(layer, _tempered(module, query, packed), key, value, settings), None


def _tempered(module: Any, query: Tensor, packed: Pass) -> Tensor:
    """Llama 4 sharpens queries of its layers without rotary by their place, which it counts along the pass."""
    if not getattr(module, "attn_temperature_tuning", False) or module.use_rope:
        return query

    def scales(places: Tensor) -> Tensor:
        steps: Tensor = torch.floor((places.float() + 1.0) / module.floor_scale)
        scaled: Tensor = torch.log1p(steps) * module.attn_scale + 1.0
        return scaled

    along = torch.arange(query.shape[2], device=query.device)
    right = scales(packed.positions(query.device)[0]) / scales(along)
    return (query * right[:, None]).to(query.dtype)


AttentionInterface.register(NAME, _attention)
