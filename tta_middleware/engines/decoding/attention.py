"""Attention itself: what a layer asks of it, and what its queries see."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tta_middleware.engines.decoding.sight import Sight


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


def bias_of(seen: Tensor, like: Tensor) -> Tensor:
    """0 where a column is seen, minus infinity elsewhere; built once a pass instead of in every layer."""
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, -torch.inf)


def repeated(heads: Tensor, groups: int) -> Tensor:
    """Key heads, each as often as query heads share it."""
    return heads if groups == 1 else heads.repeat_interleave(groups, dim=1)
