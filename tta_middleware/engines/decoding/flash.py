"""Attention of many short sequences in one kernel, where a GPU has it: FlashAttention-2 (arXiv 2307.08691).

On a CPU each sequence's attention is a call of its own. On a GPU that is some eight launches a layer for every text
that is scored, hundreds where a repair's candidates are judged, and launching them takes longer than computing them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tta_middleware.engines.decoding.attention import AttentionSettings
from tta_middleware.engines.decoding.capacity import is_out_of_memory

_log = logging.getLogger(__name__)

# What the kernel is compiled for.
_TYPES = (torch.bfloat16, torch.float16)
_LARGEST_HEAD = 256


@dataclass(frozen=True, slots=True, eq=False)
class Lengths:
    """Where sequences that lie one behind the other begin and end.

    Attributes:
        asked: (n + 1) int32: where each one's queries begin, and where the last one's end.
        seen: the same of the columns that they see.
        most_asked: queries of the one that has most.
        most_seen: columns of the longest.
    """

    asked: Tensor
    seen: Tensor
    most_asked: int
    most_seen: int

    @classmethod
    def of(cls, asked: Sequence[int], seen: Sequence[int], device: torch.device) -> Lengths:
        """By the same numbers on the host."""

        def there(ends: Sequence[int]) -> Tensor:
            return torch.tensor(list(ends), dtype=torch.int32, device=device)

        return cls(there(asked), there(seen), widest(asked), widest(seen))


def widest(ends: Sequence[int]) -> int:
    """The most that lies between two of them."""
    return max(end - start for start, end in pairwise(ends))


class Flash:
    """The kernel as one model uses it; owned by its decode thread.

    Attributes:
        possible: whether this torch and this device have it for the model, as far as is known.
    """

    def __init__(self) -> None:
        self.possible = True

    def takes(self, query: Tensor, settings: AttentionSettings, longest: int) -> bool:
        """Whether it computes what a layer asks for, of sequences of up to ``longest`` columns."""
        return (
            self.possible
            and query.dtype in _TYPES
            and query.shape[-1] % 8 == 0
            and query.shape[-1] <= _LARGEST_HEAD
            and settings.softcap is None
            and settings.sinks is None
            and settings.sight.sees_all_before(longest)
        )

    def attention(
        self, query: Tensor, keys: Tensor, values: Tensor, lengths: Lengths, settings: AttentionSettings
    ) -> Tensor | None:
        """(T, H, D) for (1, H, T, D) queries; None where it turns out that there is no such kernel.

        Each query sees its sequence up to its own column: a sequence's queries are those of its last columns, and a
        causal mask is aligned there.
        """
        rows = [heads[0].transpose(0, 1) for heads in (query, keys, values)]
        ends = (lengths.asked, lengths.seen, lengths.most_asked, lengths.most_seen)
        dropout, causal, debug = 0.0, True, False
        try:
            out: Any = torch.ops.aten._flash_attention_forward(
                *rows, *ends, dropout, causal, debug, scale=settings.scaling
            )
        except Exception as exc:
            if is_out_of_memory(exc):
                raise
            self.possible = False
            _log.info("attention of prompts and texts is computed one by one: %s", exc)
            return None
        found: Tensor = out[0]
        return found
