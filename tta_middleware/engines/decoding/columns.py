"""Keys and values of some columns of a sequence, over all layers: few tensors instead of two a layer.

What is cut, copied and joined is columns, of every layer alike. A model of 24 layers has 48 tensors of them, and on a
GPU each costs a launch whatever its size. So those of a kind lie in one block, of eight layers at most: buffers that
grow are there twice block by block (:mod:`.kv_slots`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Pair: TypeAlias = tuple[Tensor, Tensor]
"""Keys and values of one layer."""

_BLOCK_TENSORS = 16


@dataclass(frozen=True, slots=True)
class Kind:
    """Of the tensors of one block: how many, and each one's heads and head size."""

    count: int
    heads: int
    size: int
    dtype: torch.dtype
    device: torch.device


class Layout:
    """Which block, and which tensor of it, holds each layer's keys and values.

    Args:
        pairs: keys and values per layer, each (1, heads, columns, size), as a pass of the model gives them.
    """

    __slots__ = ("kinds", "places")

    def __init__(self, pairs: Sequence[Pair]) -> None:
        counts: list[int] = []
        likes: list[Tensor] = []
        open_blocks: dict[tuple[object, ...], int] = {}
        places: list[tuple[int, int]] = []
        for tensor in (tensor for pair in pairs for tensor in pair):
            alike = (tensor.shape[1], tensor.shape[3], tensor.dtype, tensor.device)
            block = open_blocks.get(alike)
            if block is None or counts[block] == _BLOCK_TENSORS:
                block = open_blocks[alike] = len(counts)
                counts.append(0)
                likes.append(tensor)
            places.append((block, counts[block]))
            counts[block] += 1
        self.places = list(zip(places[::2], places[1::2], strict=True))
        self.kinds = [
            Kind(count, like.shape[1], like.shape[3], like.dtype, like.device)
            for count, like in zip(counts, likes, strict=True)
        ]

    def pair(self, blocks: Sequence[Tensor], layer: int) -> Pair:
        """A layer's keys and values in blocks whose first dimension is the tensors of a kind."""
        (keys, key_at), (values, value_at) = self.places[layer]
        return blocks[keys][key_at], blocks[values][value_at]

    def gap(self, columns: int) -> Columns:
        """Columns that say nothing and take no memory, to be joined with others and written to there."""
        return Columns(
            self,
            [
                torch.empty((1, 1, 1, 1), dtype=kind.dtype, device=kind.device).expand(
                    kind.count, kind.heads, columns, kind.size
                )
                for kind in self.kinds
            ],
        )


class Columns:
    """Some columns; iterated over and indexed, keys and values per layer, each (1, heads, columns, size).

    Args:
        layout: whose they are.
        blocks: (tensors, heads, columns, size) of each kind.
    """

    __slots__ = ("blocks", "layout")

    def __init__(self, layout: Layout, blocks: Sequence[Tensor]) -> None:
        self.layout, self.blocks = layout, blocks

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> Columns:
        """Copied together from keys and values per layer."""
        layout = Layout(pairs)
        found: list[list[Tensor]] = [[] for _ in layout.kinds]
        for places, pair in zip(layout.places, pairs, strict=True):
            for (block, _), tensor in zip(places, pair, strict=True):
                found[block].append(tensor[0])
        return cls(layout, [torch.stack(tensors) for tensors in found])

    @classmethod
    def joined(cls, pieces: Sequence[Columns]) -> Columns:
        """One behind the other; copied unless it is one."""
        if len(pieces) == 1:
            return pieces[0]
        blocks = [torch.cat(parts, dim=2) for parts in zip(*(piece.blocks for piece in pieces), strict=True)]
        return cls(pieces[0].layout, blocks)

    def __len__(self) -> int:
        """Layers there are."""
        return len(self.layout.places)

    def __getitem__(self, layer: int) -> Pair:
        if layer >= len(self):
            raise IndexError(f"{len(self)} layers, no layer {layer}")
        keys, values = self.layout.pair(self.blocks, layer)
        return keys[None], values[None]

    @property
    def count(self) -> int:
        """How many columns."""
        return self.blocks[0].shape[2] if self.blocks else 0

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self.blocks)

    def part(self, start: int, end: int) -> Columns:
        """Those from ``start`` to before ``end``; nothing is copied."""
        return Columns(self.layout, [block[:, :, start:end] for block in self.blocks])

    def copied(self) -> Columns:
        """In memory of their own."""
        return Columns(self.layout, [block.clone(memory_format=torch.contiguous_format) for block in self.blocks])
