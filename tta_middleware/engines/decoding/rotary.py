"""Rotary embeddings with two ranges ("longrope", Phi-3.5), sequence by sequence.

Such a family turns keys and queries by one set of frequencies while a sequence has at most so many columns, and by
another set once it is longer; transformers picks one set for everything in a pass. Here each column gets its own
sequence's. A sequence that grows past the limit has to run again from its beginning, as ``generate`` lets it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class TwoRanges(nn.Module):
    """A rotary module whose columns belong to sequences of both ranges.

    Attributes:
        beyond: (1, T) which columns of the next pass belong to sequences longer than the limit; None for none.
    """

    def __init__(self, rotary: nn.Module, limit: int) -> None:
        super().__init__()
        self.rotary, self._limit = rotary, limit
        self.beyond: Tensor | None = None

    def forward(self, rows: Tensor, position_ids: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
        short = self.rotary(rows, position_ids.clamp(max=self._limit - 1), *rest, **named)
        if self.beyond is None:
            return short[0], short[1]
        # One column more, past the limit, makes transformers take the other set.
        edge = torch.full_like(position_ids[:, :1], self._limit)
        long = self.rotary(rows, torch.cat([position_ids, edge], dim=1), *rest, **named)
        beyond = self.beyond[..., None]
        return torch.where(beyond, long[0][:, :-1], short[0]), torch.where(beyond, long[1][:, :-1], short[1])


def short_range(config: Any) -> int | None:
    """Columns up to which a sequence keeps the first set; None where there is one set, or no longer sequence."""
    limits = [
        parameters["original_max_position_embeddings"]
        for parameters in _kinds(getattr(config, "rope_parameters", None))
        if parameters.get("rope_type") == "longrope"
    ]
    context: int | None = getattr(config, "max_position_embeddings", None)
    limit = min(limits, default=None)
    return None if limit is None or (context is not None and context <= limit) else int(limit)


def _kinds(parameters: Any) -> list[Mapping[str, Any]]:
    """One set of parameters, or one for each kind of layer."""
    if not isinstance(parameters, Mapping):
        return []
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    return nested if nested and "rope_type" not in parameters else [parameters]


def take_two_ranges(model: nn.Module, limit: int) -> list[TwoRanges]:
    """Wrap every rotary module of a model."""
    wrapped: list[TwoRanges] = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, "inv_freq") and not isinstance(parent, TwoRanges):
                wrapped.append(TwoRanges(child, limit))
                setattr(parent, name, wrapped[-1])
    return wrapped
