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
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from tta_middleware.engines.decoding.kv_slots import KVSlots, Prefix, Shape
from tta_middleware.engines.decoding.sight import Sight
from tta_middleware.errors import EngineError

NAME = "tta_packed"


class Segment:
    """Some columns (t, d) of one sequence, behind the prefix that has run already.

    Attributes:
        keep: of how many of its last columns the logits are wanted.
        read_layers: layers whose states at these columns are wanted as well.
        read_spans: in place of states, the means of what these layers keep as values of the sequence's columns, each
            from its first number to before its second.
        states: per layer (keep, d) of them, once the pass has run; (s, v) of s spans.
        long: its sequence is longer than the model's short range; see :mod:`.rotary`.
        layers: keys and values of all its columns so far.
    """

    def __init__(
        self,
        rows: Tensor,
        past: Prefix | None,
        keep: int,
        *,
        read_layers: Sequence[int] = (),
        read_spans: Sequence[tuple[int, int]] = (),
        long: bool = False,
    ) -> None:
        self.rows, self.past, self.keep, self.long = rows, past, keep, long
        self.read_layers = tuple(read_layers) if keep else ()
        self.read_spans = tuple(read_spans)
        self.states: dict[int, Tensor] = {}
        self.layers: list[tuple[Tensor, Tensor]] = []
        self._masks: dict[Sight, Tensor | None] = {}

    @property
    def start(self) -> int:
        """Its first column's place in the sequence."""
        return self.past.length if self.past else 0

    @property
    def end(self) -> int:
        return self.start + len(self.rows)

    def prefix(self) -> Prefix:
        """All its columns, for what follows."""
        return Prefix([(keys.contiguous(), values.contiguous()) for keys, values in self.layers], self.end)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, layer: int, settings: AttentionSettings) -> Tensor:
        """(1, H, t, D) queries over its own and the prefix's columns, each over those before it."""
        if self.past is not None:
            old_keys, old_values = self.past.pieces(layer)
            keys, values = torch.cat([*old_keys, keys], dim=2), torch.cat([*old_values, values], dim=2)
        self.layers.append((keys, values))
        if self.read_spans and layer + 1 in self.read_layers:
            means = [values[0, :, slice(*span)].float().mean(dim=1).flatten() for span in self.read_spans]
            self.states[layer + 1] = torch.stack(means)
        groups = query.shape[1] // keys.shape[1]
        return settings.attention(
            query, _repeated(keys, groups), _repeated(values, groups), self._mask(settings.sight, query)
        )

    def _mask(self, sight: Sight, like: Tensor) -> Tensor | None:
        if sight not in self._masks:
            places = torch.arange(self.end, device=like.device)
            self._masks[sight] = _bias(sight.seen(places[None], places[self.start :, None]), like)[None, None]
        return self._masks[sight]


class AttentionSettings:
    """What a layer asks of attention.

    Args:
        scaling: of the products of queries and keys; None for the square root of the head's size.
        softcap: what the logits are soft-capped at.
        sight: which columns a query sees.
        sinks: (H,) a logit for each query head that takes its share of attention and gives nothing (GPT-OSS).
    """

    __slots__ = ("scaling", "sight", "sinks", "softcap")

    def __init__(self, scaling: float | None, softcap: float | None, sight: Sight, sinks: Tensor | None = None) -> None:
        self.scaling, self.softcap, self.sight, self.sinks = scaling, softcap, sight, sinks

    def attention(self, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """softmax(q k' scaling + bias) v, the logits soft-capped before the bias where the family does so.

        Queries are (1, H, t, D), or (n, K, H / K, D) where query heads that share a key head are rows of one product.
        """
        if self.softcap is None and self.sinks is None:
            return scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=self.scaling)
        logits = (query @ keys.mT) * (self.scaling or query.shape[-1] ** -0.5)
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        if bias is not None:
            logits = logits + bias
        if self.sinks is None:
            return logits.softmax(dim=-1, dtype=torch.float32).to(query.dtype) @ values
        # By key head and group where heads are folded, by head where they are not.
        sinks = self.sinks.reshape(1, query.shape[1], -1, 1).to(logits.dtype).expand(*logits.shape[:3], 1)
        weights = torch.cat([logits, sinks], dim=-1).softmax(dim=-1, dtype=torch.float32)[..., :-1]
        return weights.to(query.dtype) @ values


class Pass:
    """What one forward pass runs: one new column for every slot, then segments.

    Args:
        slots: the sequences that decode, with room reserved; empty where only segments run.
        segments: columns of sequences that join or are scored.

    Attributes:
        layers_run: layers whose attention came here; a model that bypasses it would compute nonsense.
        sights: what each layer sees; set by the model.
    """

    def __init__(self, slots: KVSlots, segments: Sequence[Segment]) -> None:
        self.layers_run = 0
        self.slots = slots
        self.sights: Mapping[int, Sight] = {}
        self._lengths, self._segments = slots.step_lengths, segments
        self._biases: dict[tuple[Sight, int], Tensor | None] = {}

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
            long += [segment.long] * len(segment.rows)
        return torch.tensor([long], device=device) if any(long) else None

    def kept(self, device: torch.device) -> Tensor:
        """Indices of the columns whose logits are wanted, slots first."""
        end = len(self._lengths)
        wanted = list(range(end))
        for segment in self._segments:
            end += len(segment.rows)
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
        for segment in self._segments:
            mine = slice(at, at + len(segment.rows))
            out = segment.attend(query[:, :, mine], keys[:, :, mine], values[:, :, mine], layer, settings)
            parts.append(out[0].transpose(0, 1))
            at = mine.stop
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[None]

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
    return _bias(sight.seen(places, newest[:, None]), like)[:, None, None]


def _bias(seen: Tensor, like: Tensor) -> Tensor:
    """0 where a column is seen, minus infinity elsewhere; built once a pass instead of in every layer."""
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, -torch.inf)


def _repeated(heads: Tensor, groups: int) -> Tensor:
    return heads if groups == 1 else heads.repeat_interleave(groups, dim=1)


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
