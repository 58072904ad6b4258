"""Keys and values of the running batch, in one buffer per layer that rows join and leave without a rebuild.

All rows share their columns: every sequence ends at column ``end`` and is padded on the left. A decode step
writes one column in place, a row that leaves is overwritten by the last one, and common left padding is cut off
by moving ``start``. transformers' own DynamicCache copies the whole cache on every step instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from tta_middleware.errors import EngineError

# Columns are allocated this many at a time.
_BLOCK = 128


class _Window:
    """The part of the buffers that is in use."""

    __slots__ = ("end", "rows", "start")

    def __init__(self, rows: int, end: int) -> None:
        self.rows = rows
        self.start = 0
        self.end = end


class _SlabLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped
    """One layer's buffers, shaped (rows, heads, columns, head size)."""

    def __init__(self, window: _Window, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self.window = window

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: object, **_kwargs: object
    ) -> tuple[Tensor, Tensor]:
        window = self.window
        end = window.end + key_states.shape[-2]
        self.keys[: window.rows, :, window.end : end] = key_states
        self.values[: window.rows, :, window.end : end] = value_states
        return self._used(self.keys, end), self._used(self.values, end)

    def get_seq_length(self) -> int:
        return self.window.end - self.window.start

    def used(self) -> tuple[Tensor, Tensor]:
        return self._used(self.keys, self.window.end), self._used(self.values, self.window.end)

    def _used(self, buffer: Tensor, end: int) -> Tensor:
        return buffer[: self.window.rows, :, self.window.start : end]


class SlabCache:
    """The cache of a running batch.

    Attributes:
        first: for each row, the column of its first token.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]], first: Sequence[int], end: int) -> None:
        self.first = list(first)
        self._window = _Window(len(self.first), end)
        self._layers = [_SlabLayer(self._window, keys, values) for keys, values in layers]
        self.cache = Cache(layers=self._layers)

    @property
    def start(self) -> int:
        return self._window.start

    @property
    def end(self) -> int:
        return self._window.end

    def reserve(self) -> None:
        """Make room for one more column."""
        if self.end < self._layers[0].keys.shape[-2]:
            return
        start, length = self._window.start, self.end - self._window.start
        for layer in self._layers:
            keys, values = layer.used()
            layer.keys, layer.values = _roomy([keys], length), _roomy([values], length)
        self.first = [column - start for column in self.first]
        self._window.start, self._window.end = 0, length

    def advance(self) -> None:
        """Count the column that a decode step has written."""
        self._window.end += 1

    def joined(self, prefill: DynamicCache, first: Sequence[int]) -> SlabCache:
        """A cache with this one's rows followed by those of a prefilled batch."""
        fresh = layers_of(prefill, len(first))
        mine, theirs = self.end - self._window.start, fresh[0][0].shape[-2]
        length = max(mine, theirs)
        layers = [
            (_roomy([old_keys, keys], length), _roomy([old_values, values], length))
            for (old_keys, old_values), (keys, values) in zip(
                (layer.used() for layer in self._layers), fresh, strict=True
            )
        ]
        shift = length - mine - self._window.start
        starts = [column + shift for column in self.first] + [column + length - theirs for column in first]
        return SlabCache(layers, starts, length)

    def remove(self, row: int) -> None:
        """Drop a row; the last row takes its place."""
        last = self._window.rows - 1
        if row != last:
            for layer in self._layers:
                layer.keys[row].copy_(layer.keys[last])
                layer.values[row].copy_(layer.values[last])
            self.first[row] = self.first[last]
        self.first.pop()
        self._window.rows = last
        if self.first:
            self._window.start = min(self.first)


def slab_from(prefill: DynamicCache, first: Sequence[int]) -> SlabCache:
    """A cache that goes on from a prefilled batch; ``first`` is each row's first column."""
    layers = layers_of(prefill, len(first))
    length = layers[0][0].shape[-2]
    roomy = [(_roomy([keys], length), _roomy([values], length)) for keys, values in layers]
    return SlabCache(roomy, first, length)


def layers_of(prefill: DynamicCache, rows: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values per layer.

    Raises:
        EngineError: a layer keeps something else (recurrent state, shared or latent keys).
    """
    for layer in prefill.layers:
        keys = getattr(layer, "keys", None)
        if type(layer) is not DynamicLayer or keys is None or keys.ndim != 4 or keys.shape[0] != rows:
            raise EngineError("this model's attention cache is not one key and value per token; it cannot be batched")
    return [(layer.keys, layer.values) for layer in prefill.layers]


def _roomy(parts: Sequence[Tensor], length: int) -> Tensor:
    """The parts stacked along the batch, flush right at column ``length``, with free columns behind."""
    rows = sum(part.shape[0] for part in parts)
    _, heads, _, size = parts[0].shape
    # Zeros, not garbage: a masked NaN would still spoil the sum it is weighted into with 0.
    buffer = torch.zeros((rows, heads, length + _BLOCK, size), dtype=parts[0].dtype, device=parts[0].device)
    row = 0
    for part in parts:
        buffer[row : row + part.shape[0], :, length - part.shape[-2] : length] = part
        row += part.shape[0]
    return buffer
