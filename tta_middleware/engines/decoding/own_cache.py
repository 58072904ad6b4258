"""What is done to a model's own cache: taking sequences out, laying several side by side, padding, copying.

transformers keeps a cache as objects that hold tensors by sequence, in lists and dicts by layer; older families hand
their states out as plain lists of tensors. All of it is walked here without knowing a family.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, cache_utils

# Layers whose columns may be padded in front: keys and values by place, and states that zeros leave as they are.
_BY_PLACE = ("DynamicLayer", "DynamicSlidingWindowLayer")
_BY_STATE = ("LinearAttentionLayer", "DummyLayer")


class NotAlike(Exception):
    """Two caches differ in more than their numbers, so they cannot lie side by side."""


@dataclass(frozen=True, slots=True)
class OwnCache:
    """A model's cache of one or several sequences; handed on, never shared.

    Attributes:
        inner: what the model takes and gives.
        columns: that have run, padding included; the same for every sequence.
        padding: empty columns before each sequence.
    """

    inner: Any
    columns: int
    padding: tuple[int, ...]

    @property
    def size(self) -> int:
        """Sequences."""
        return len(self.padding)

    def lengths(self) -> list[int]:
        """Columns of each sequence."""
        return [self.columns - padding for padding in self.padding]

    @property
    def nbytes(self) -> int:
        total = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        _walk([self.inner], lambda tensors: count(tensors[0]))
        return total

    def select(self, sequences: Sequence[int]) -> OwnCache:
        """A copy with some of its sequences, any of them more than once."""
        index = torch.tensor(sequences, dtype=torch.long)

        def pick(tensors: Sequence[Tensor]) -> Tensor:
            [tensor] = tensors
            return tensor.index_select(0, index.to(tensor.device)) if _holds(tensor, self.size) else tensor.clone()

        padding = tuple(self.padding[sequence] for sequence in sequences)
        return replace(self, inner=_walk([self.inner], pick), padding=padding)

    def padded(self, columns: int) -> OwnCache:
        """The same with empty columns in front, up to ``columns``.

        Raises:
            NotAlike: it has layers of which it is not known what that means.
        """
        more = columns - self.columns
        if more == 0:
            return self
        inner = copy.copy(self.inner)
        inner.layers = [_padded(layer, more, self.size) for layer in _layers(self.inner)]
        return OwnCache(inner, columns, tuple(padding + more for padding in self.padding))

    def trimmed(self) -> OwnCache:
        """The same without columns that are empty in every sequence."""
        spare = min(self.padding)
        if spare == 0:
            return self
        inner = copy.copy(self.inner)
        inner.layers = [_trimmed(layer, spare) for layer in _layers(self.inner)]
        return OwnCache(inner, self.columns - spare, tuple(padding - spare for padding in self.padding))


def side_by_side(caches: Sequence[OwnCache]) -> OwnCache:
    """All sequences of several caches in one.

    Raises:
        NotAlike: they have another number of columns, or differ otherwise.
    """
    if len({cache.columns for cache in caches}) != 1:
        raise NotAlike("their sequences have different lengths")
    sizes = [cache.size for cache in caches]

    def join(tensors: Sequence[Tensor]) -> Tensor:
        if all(_holds(tensor, size) for tensor, size in zip(tensors, sizes, strict=True)):
            if len({tensor.shape[1:] for tensor in tensors}) != 1:
                raise NotAlike("their states have different shapes")
            return torch.cat(list(tensors))
        if any(not torch.equal(tensor, tensors[0]) for tensor in tensors):
            raise NotAlike("they hold numbers that belong to no sequence")
        return tensors[0]

    padding = tuple(padding for cache in caches for padding in cache.padding)
    return OwnCache(_walk([cache.inner for cache in caches], join), caches[0].columns, padding)


def _holds(tensor: Tensor, size: int) -> bool:
    return tensor.dim() > 0 and tensor.shape[0] == size


def _walk(values: Sequence[Any], change: Callable[[Sequence[Tensor]], Tensor]) -> Any:
    """What several structures of one form hold, tensor by tensor, in a new structure of that form."""
    first = values[0]
    if len({type(value) for value in values}) != 1:
        raise NotAlike("they are of different kinds")
    if isinstance(first, Tensor):
        return change(values)
    if isinstance(first, dict):
        if any(value.keys() != first.keys() for value in values):
            raise NotAlike("they hold different things")
        return {key: _walk([value[key] for value in values], change) for key in first}
    if isinstance(first, list | tuple):
        if len({len(value) for value in values}) != 1:
            raise NotAlike("they have different lengths")
        return type(first)(_walk(parts, change) for parts in zip(*values, strict=True))
    if isinstance(first, PreTrainedConfig):
        return first
    if type(first).__module__.startswith("transformers") and hasattr(first, "__dict__"):
        made = copy.copy(first)
        vars(made).update(_walk([vars(value) for value in values], change))
        return made
    if not callable(first) and any(value != first for value in values):
        raise NotAlike("they are at different places")
    return first


def _layers(inner: Any) -> list[Any]:
    layers = getattr(inner, "layers", None)
    if not isinstance(layers, list):
        raise NotAlike("this cache cannot be padded")
    return layers


def _kind(layer: Any) -> tuple[bool, bool]:
    """Whether a layer keeps columns by their place, and whether it keeps states; of classes that are known alone."""
    if type(layer).__module__ != cache_utils.__name__:
        raise NotAlike("this cache cannot be padded")
    names = {cls.__name__ for cls in type(layer).__mro__}
    by_place, by_state = bool(names & set(_BY_PLACE)), bool(names & set(_BY_STATE))
    if not (by_place or by_state) or "DynamicIndexedLayer" in names or "BaseQuantizedLayer" in names:
        raise NotAlike("this cache cannot be padded")
    return by_place, by_state


def _padded(layer: Any, more: int, size: int) -> Any:
    by_place, _ = _kind(layer)
    if not by_place or not layer.is_initialized:
        return layer
    made = copy.copy(layer)
    wanted = layer.keys.shape[-2] + more
    if hasattr(layer, "cumulative_length"):
        made.cumulative_length = layer.cumulative_length + more
        wanted = min(made.cumulative_length, layer.sliding_window - 1)
    made.keys, made.values = _filled(layer.keys, wanted), _filled(layer.values, wanted)
    return made


def _filled(columns: Tensor, wanted: int) -> Tensor:
    """Zeros in front of (B, heads, T, n) columns, so that there are ``wanted``."""
    return torch.nn.functional.pad(columns, (0, 0, wanted - columns.shape[-2], 0))


def _trimmed(layer: Any, spare: int) -> Any:
    by_place, _ = _kind(layer)
    if not by_place or not layer.is_initialized:
        return layer
    made = copy.copy(layer)
    keep = layer.keys.shape[-2] - spare
    if hasattr(layer, "cumulative_length"):
        made.cumulative_length = layer.cumulative_length - spare
        keep = min(made.cumulative_length, layer.sliding_window - 1)
    have = layer.keys.shape[-2]
    made.keys, made.values = layer.keys[:, :, have - keep :], layer.values[:, :, have - keep :]
    return made
