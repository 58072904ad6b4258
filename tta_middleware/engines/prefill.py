"""The first forward pass of new sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from tta_middleware.engines.loaded import LoadedModel
from tta_middleware.types import FloatMatrix

# A shorter common beginning is not worth a forward pass of its own.
_WORTH_SHARING = 16


@dataclass(frozen=True, slots=True)
class Prefilled:
    """Logits (B, V) after each prompt, the cache of all, and each row's first column."""

    logits: Tensor
    cache: DynamicCache
    first: list[int]


def prefill(model: LoadedModel, matrices: Sequence[FloatMatrix]) -> Prefilled:
    """Run prompts, (T_i, d) each, as one left-padded batch.

    The rows with which all prompts begin (the template before the user's words) are run once.
    """
    shared = _shared_rows(matrices)
    if shared >= _WORTH_SHARING:
        return _from_shared(model, matrices, shared)
    lengths = [len(matrix) for matrix in matrices]
    width = max(lengths)
    embeds = torch.zeros((len(matrices), width, model.width), dtype=model.dtype, device=model.device)
    for row, matrix in enumerate(matrices):
        embeds[row, width - len(matrix) :] = model.to_tensor(matrix)
    first = [width - length for length in lengths]
    # Without a config the cache keeps every layer whole, sliding windows too.
    cache = DynamicCache()
    mask, positions = columns(first, 0, width, width, model.device)
    logits = model.forward(embeds, mask=mask, positions=positions, cache=cache)
    return Prefilled(logits[:, -1], cache, first)


def columns(
    first: Sequence[int], start: int, end: int, count: int, device: torch.device
) -> tuple[Tensor | None, Tensor]:
    """Attention mask (B, end - start) and positions (B, count) of the last ``count`` columns before ``end``.

    The mask is None when no row is padded, which lets attention take its fastest path.
    """
    starts = torch.tensor(first, device=device)[:, None]
    positions = (torch.arange(end - count, end, device=device)[None] - starts).clamp(min=0)
    if all(column == start for column in first):
        return None, positions
    return torch.arange(start, end, device=device)[None] >= starts, positions


def _from_shared(model: LoadedModel, matrices: Sequence[FloatMatrix], shared: int) -> Prefilled:
    cache, count = DynamicCache(), len(matrices)
    _, positions = columns([0], 0, shared, shared, model.device)
    model.forward(model.to_tensor(matrices[0][:shared])[None], mask=None, positions=positions, cache=cache)
    cache.batch_repeat_interleave(count)
    rest = torch.stack([model.to_tensor(matrix[shared:]) for matrix in matrices])
    length = len(matrices[0])
    _, positions = columns([0] * count, 0, length, length - shared, model.device)
    logits = model.forward(rest, mask=None, positions=positions, cache=cache)
    return Prefilled(logits[:, -1], cache, [0] * count)


def _shared_rows(matrices: Sequence[FloatMatrix]) -> int:
    """Rows with which all prompts begin; 0 unless there are several of one length."""
    head, *others = matrices
    if not others or any(len(other) != len(head) for other in others):
        return 0
    shared = len(head) - 1
    for other in others:
        differs = np.flatnonzero((head[:shared] != other[:shared]).any(axis=1))
        shared = int(differs[0]) if differs.size else shared
    return shared
