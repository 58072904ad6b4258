"""What a query sees of its own sequence, layer by layer, read from the masks that a model makes for itself.

A family says in several places what its layers see: in ``layer_types``, in what a layer hands to attention, in the
masks of its forward pass. The masks are what counts, so a short pass is run in which transformers' mask functions and
attention come here, and each mask's rule is tried at the places where windows and chunks begin and end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

PROBE = "tta_probe"

Rule: TypeAlias = Callable[[Any, Any, Any, Any], Any]
"""A mask as transformers has it: of batch, head, query and key indices, whether the query sees the key."""

# What layers hand to attention and this engine computes, or what does not change a result outside training.
_KNOWN = frozenset(
    {"scaling", "softcap", "sliding_window", "s_aux", "dropout", "is_causal", "position_ids", "use_cache"}
    | {"cache_position", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict"}
    | {"logits_to_keep", "position_embeddings", "layer_idx", "num_items_in_batch", "attention_mask", "shared_kv_states"}
)


class NotPackable(Exception):
    """A model cannot share a pass with several sequences; the text says why, as a part of a sentence."""


@dataclass(frozen=True, slots=True)
class Sight:
    """Which columns a query sees: those up to its own, at most ``window`` of them, of its own ``chunk``."""

    window: int | None = None
    chunk: int | None = None

    def seen(self, places: Tensor, asking: Tensor) -> Tensor:
        """For places of columns and of queries in their sequence, which column is seen by which query."""
        found = places <= asking
        if self.window is not None:
            found = found & (places > asking - self.window)
        if self.chunk is not None:
            found = found & (places // self.chunk == asking // self.chunk)
        return found

    def sees_all_before(self, length: int) -> bool:
        """Whether the query after ``length`` columns sees all of them."""
        return (self.window is None or self.window > length) and (self.chunk is None or length < self.chunk)


class _Notes(threading.local):
    """What the probing pass of this thread has met; None outside of one."""

    masks: dict[int, tuple[Tensor, Rule]] | None = None
    layers: dict[int, Sight] | None = None
    candidates: tuple[Sight, ...] = ()


_notes = _Notes()


def read_sights(config: Any, run: Callable[[], object]) -> dict[int, Sight]:
    """What each layer sees, by a short pass ``run`` of a model whose attention is :data:`PROBE`.

    Raises:
        NotPackable: a layer's mask is none that is known, or attention is given more than this engine computes.
    """
    _notes.masks, _notes.layers, _notes.candidates = {}, {}, _candidates(config)
    try:
        run()
        return dict(_notes.layers)
    finally:
        _notes.masks = _notes.layers = None


def _candidates(config: Any) -> tuple[Sight, ...]:
    windows = _numbers(config, "sliding_window")
    chunks = _numbers(config, "attention_chunk_size")
    return Sight(), *(Sight(window=number) for number in windows), *(Sight(chunk=number) for number in chunks)


def _numbers(config: Any, name: str) -> list[int]:
    found = getattr(config, name, None)
    numbers = found.values() if isinstance(found, Mapping) else found if isinstance(found, Iterable) else [found]
    return sorted({number for number in numbers if isinstance(number, int) and number > 0})


def _note_mask(
    *,
    kv_length: int,
    mask_function: Rule,
    q_length: int = 0,
    cache_position: Tensor | None = None,
    q_offset: int = 0,
    kv_offset: int = 0,
    device: torch.device | str = "cpu",
    **_rest: Any,
) -> Tensor:
    """The mask that a model asks transformers for, as a (1, 1, q, k) tensor whose rule is remembered."""
    # Older releases of transformers give the places of queries as a tensor.
    asking = torch.arange(q_length, device=device) + q_offset if cache_position is None else cache_position
    places = torch.arange(kv_length, device=device)[None] + kv_offset
    mask: Tensor = mask_function(0, 0, asking[:, None], places).expand(len(asking), kv_length)[None, None].clone()
    if _notes.masks is not None:
        _notes.masks[id(mask)] = mask, mask_function
    return mask


def _sight_of(rule: Rule, candidates: Iterable[Sight]) -> Sight:
    """Which of the candidates a rule is, tried where they begin and end."""
    known = list(candidates)
    edges = {number for sight in known for number in (sight.window, sight.chunk) if number is not None}
    near = sorted({max(0, times * edge + by) for edge in edges for times in (1, 2) for by in (-1, 0, 1)} | {0, 1, 7})
    for sight in known:
        for place in near:
            asking = torch.tensor([place])[:, None]
            columns = sorted({max(0, place - edge + by) for edge in edges for by in (-1, 0, 1)} | set(near) | {place})
            places = torch.tensor(columns)[None]
            if not torch.equal(rule(0, 0, asking, places).expand(1, len(columns)), sight.seen(places, asking)):
                break
        else:
            return sight
    raise NotPackable("its layers see other columns than those before, in a window or in a chunk")


def _probe(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Attention of the probing pass: its numbers are thrown away, what it is given is noted."""
    if unknown := sorted(name for name in set(rest) - _KNOWN if rest[name] is not None and rest[name] is not False):
        raise NotPackable(f"its attention is given {', '.join(unknown)}")
    layer = getattr(module, "layer_idx", None)
    if layer is None or _notes.layers is None or _notes.masks is None:
        raise NotPackable("its attention does not say which layer it is")
    if layer in _notes.layers:
        raise NotPackable("a layer attends more than once")
    known = _notes.masks.get(id(attention_mask))
    if known is not None:
        sight = _sight_of(known[1], _notes.candidates)
    elif attention_mask is not None:
        raise NotPackable("it makes masks of its own")
    elif sliding_window is None and len(_notes.candidates) > 1:
        raise NotPackable("it has windows or chunks that attention is not told of")
    else:
        sight = Sight(window=sliding_window)
    _notes.layers[layer] = sight
    groups = query.shape[1] // key.shape[1]
    keys, values = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    out = scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(PROBE, _probe)
AttentionMaskInterface.register(PROBE, _note_mask)
