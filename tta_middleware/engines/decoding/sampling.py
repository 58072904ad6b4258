"""Picks the next token of every row from its logits. Pure torch; no state but the rows' own generators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tta_middleware.types import Sampling

# The nucleus of almost every step lies in this many tokens; sorting a whole vocabulary costs milliseconds a row.
_NUCLEUS_GUESS = 256
_COLDEST = 1e-4


def seeded(sampling: Sampling) -> torch.Generator | None:
    """The generator of one sequence; None when it decodes greedily."""
    if sampling.temperature == 0.0:
        return None
    return torch.Generator().manual_seed(sampling.seed % 2**63)


def next_tokens(
    logits: Tensor, samplings: Sequence[Sampling], generators: Sequence[torch.Generator | None]
) -> list[int | None]:
    """One token id per row of the (B, V) logits; None where a row's logits are not finite."""
    best, chosen = logits.max(dim=-1)
    finite: list[bool] = torch.isfinite(best).tolist()
    ids: list[int | None] = list(chosen.tolist())
    sampled = [row for row, generator in enumerate(generators) if generator is not None and finite[row]]
    if sampled:
        drawn = _draw(logits[sampled], [samplings[row] for row in sampled], [generators[row] for row in sampled])
        for row, token in zip(sampled, drawn, strict=True):
            ids[row] = token
    return [token if ok else None for token, ok in zip(ids, finite, strict=True)]


def _draw(logits: Tensor, samplings: Sequence[Sampling], generators: Sequence[torch.Generator | None]) -> list[int]:
    temperature = [max(sampling.temperature, _COLDEST) for sampling in samplings]
    scaled = logits.float() / logits.new_tensor(temperature, dtype=torch.float32)[:, None]
    probabilities = scaled.softmax(dim=-1)
    # One uniform number per row and step, so what a row draws does not depend on its batch.
    uniform = torch.stack([torch.rand((), generator=generator, dtype=torch.float64) for generator in generators])
    uniform = uniform.to(logits.device)[:, None]
    if all(sampling.top_p == 1.0 for sampling in samplings):
        return _invert(probabilities, uniform)
    top_p = probabilities.new_tensor([sampling.top_p for sampling in samplings])[:, None]
    ranked, order = _nucleus(probabilities, top_p)
    places = _invert(ranked, uniform)
    picked: list[int] = order.gather(1, order.new_tensor(places)[:, None]).flatten().tolist()
    return picked


def _nucleus(probabilities: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest set of likeliest tokens whose mass reaches ``top_p``; the rest is zeroed."""
    vocabulary = probabilities.shape[-1]
    ranked, order = probabilities.topk(min(_NUCLEUS_GUESS, vocabulary))
    if bool((ranked.sum(dim=-1, keepdim=True) < top_p).any()):
        ranked, order = probabilities.sort(dim=-1, descending=True)
    before = ranked.cumsum(dim=-1) - ranked
    # The likeliest one is in it whatever the mass, which may be too small for these numbers.
    return ranked.masked_fill((before >= top_p) & (before > 0.0), 0.0), order


def _invert(probabilities: Tensor, uniform: Tensor) -> list[int]:
    """Inverse of the cumulative distribution at ``uniform`` times the row's mass."""
    cumulative = probabilities.double().cumsum(dim=-1)
    index = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    places: list[int] = index.clamp(max=probabilities.shape[-1] - 1).flatten().tolist()
    return places
