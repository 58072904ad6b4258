"""Measures on the unmoved model: how likely texts are, which tokens embeddings are nearest to, where words point."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tta_middleware.engines.loaded import LoadedModel
from tta_middleware.engines.prefill import columns, prefill
from tta_middleware.engines.vocabulary import Vocabulary
from tta_middleware.errors import ConfigurationError
from tta_middleware.types import FloatMatrix, IntVector

# Logits of one pass stay below this many numbers (512 MB in float32).
_LOGITS_BUDGET = 2**27
_TABLE_CHUNK = 16384


def mean_nll(model: LoadedModel, prompt: FloatMatrix, completions: Sequence[Sequence[int]]) -> list[float]:
    """Mean negative log-likelihood in nats per token of each completion after the (T, d) prompt; NaN if empty.

    The prompt is run once; the completions follow as one right-padded batch, in as few passes as memory allows.
    """
    scores = [math.nan] * len(completions)
    places = [index for index, completion in enumerate(completions) if completion]
    if not places:
        return scores
    longest = max(len(completions[index]) for index in places)
    chunk = max(1, _LOGITS_BUDGET // (longest * len(model.table)))
    for at in range(0, len(places), chunk):
        part = places[at : at + chunk]
        for index, score in zip(part, _batch_nll(model, prompt, [completions[i] for i in part]), strict=True):
            scores[index] = score
    return scores


def _batch_nll(model: LoadedModel, prompt: FloatMatrix, completions: Sequence[Sequence[int]]) -> list[float]:
    count, length = len(completions), max(map(len, completions))
    padded = torch.zeros((count, length), dtype=torch.long, device=model.device)
    real = torch.zeros((count, length), dtype=torch.bool, device=model.device)
    for row, ids in enumerate(completions):
        padded[row, : len(ids)] = torch.tensor(ids, device=model.device)
        real[row, : len(ids)] = True
    with torch.inference_mode():
        logits = _logits_of(model, prompt, padded).float()
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), padded, reduction="none")
        means: list[float] = ((nll * real).sum(dim=1) / real.sum(dim=1)).tolist()
    return means


def _logits_of(model: LoadedModel, prompt: FloatMatrix, padded: Tensor) -> Tensor:
    """(B, L, V) logits that predict the (B, L) tokens after the prompt; padding is causal, so it needs no mask."""
    count, length = padded.shape
    ready = prefill(model, [prompt])
    first = ready.logits[:, None].expand(count, 1, -1)
    if length == 1:
        return first
    ready.cache.batch_repeat_interleave(count)
    embeds = model.embedding(padded[:, :-1])
    total = len(prompt) + length - 1
    _, positions = columns([0] * count, 0, total, length - 1, model.device)
    rest = model.forward(embeds, mask=None, positions=positions, cache=ready.cache, keep=length - 1)
    return torch.cat([first, rest], dim=1)


def directions(model: Vocabulary, words: Sequence[str]) -> FloatMatrix:
    """(n, d) rows of length 1: each word's mean token embedding less the mean of the whole table."""
    if any(not word.strip() for word in words):
        raise ConfigurationError("a direction needs a word, not a blank")
    with torch.inference_mode():
        # The table itself: some families scale rows on look-up, which would shift them against the mean.
        centre = model.table.mean(dim=0, dtype=torch.float32)
        rows = [model.table[_ids_within_text(model, word)].float().mean(dim=0) - centre for word in words]
        stacked = torch.stack(rows) if rows else torch.zeros((0, model.width), device=model.device)
        found: FloatMatrix = torch.nn.functional.normalize(stacked, dim=1).cpu().numpy()
    return found


def _ids_within_text(model: Vocabulary, word: str) -> list[int]:
    ids: list[int] = model.tokenizer(f" {word.strip()}", add_special_tokens=False)["input_ids"]
    return ids


def nearest_tokens(model: Vocabulary, rows: FloatMatrix) -> IntVector:
    """For (n, d) rows, the (n,) ids of the nearest input embeddings by cosine."""
    with torch.inference_mode():
        queries = torch.from_numpy(np.ascontiguousarray(rows)).to(model.device, torch.float32)
        best = torch.full((len(queries),), -math.inf, device=model.device)
        ids = torch.zeros(len(queries), dtype=torch.long, device=model.device)
        for at in range(0, len(model.table), _TABLE_CHUNK):
            part = torch.nn.functional.normalize(model.table[at : at + _TABLE_CHUNK].float(), dim=1)
            scores, found = (queries @ part.T).max(dim=1)
            better = scores > best
            best, ids = torch.where(better, scores, best), torch.where(better, found + at, ids)
        nearest: IntVector = ids.cpu().numpy()
    return nearest
