"""Whether two ways of running a model give the same, within what its numbers can tell apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Of the root mean square of a column's logits. Sums in another order move them by a few units of the last place of
# what is added up; a wrong mask or place moves them by some tenths.
_EXACT, _SHORT = 1e-3, 0.12


def precision(model: Any) -> torch.dtype:
    """The type in which a model tells numbers apart: its own, or a short one where its layers are quantised.

    Those that round what they are given (LLM.int8, 8-bit weights and activations) turn the last place of a sum into a
    whole step of theirs, and LLM.int8 picks the columns that it does not round by all that runs at once.
    """
    dtype: torch.dtype = model.dtype
    return torch.bfloat16 if getattr(model, "is_quantized", False) else dtype


def agree(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Whether two sets of logits (..., V) are those of one column each, by their differences from their means."""
    first, second = one.float(), other.float()
    if not (torch.isfinite(first).all() and torch.isfinite(second).all()):
        return False
    first, second = (logits - logits.mean(dim=-1, keepdim=True) for logits in (first, second))
    off = (first - second).square().mean(dim=-1).sqrt()
    scale = second.square().mean(dim=-1).sqrt().clamp_min(1e-6)
    bound = _EXACT if dtype in (torch.float32, torch.float64) else _SHORT
    return bool((off <= bound * scale).all())


def sample_ids(model: Any, count: int, seed: int) -> list[int]:
    """Some tokens of a model's vocabulary, spread over it; the same every time."""
    vocabulary = len(model.table)
    return [(seed * 7919 + at * 104_729) % vocabulary for at in range(count)]
