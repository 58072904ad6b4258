"""Measures on a model's embedding table: which tokens rows are nearest to, and where words point."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tta_middleware.aio import process as _process
from tta_middleware.engines.decoding.packing import can_pack
from tta_middleware.errors import ConfigurationError
from tta_middleware.types import FloatMatrix, IntVector

# Rows and columns of the table that are copied in float32 at once, and scores held at once: 134 MB for 4096 rows of
# 8192 numbers, 67 MB for 64 columns of 262144, 50 MB for the scores in bfloat16 and float32.
_ROWS, _COLUMNS, _SCORES = 4096, 64, 2**23
_WORDS = 256

# Bfloat16 has 8 significant bits. Rounding a query q moves its product with a row of length 1 by at most 2**-8 |q|
# (Cauchy-Schwarz; the table's rows are not rounded), rounding the product by 2**-8 |q| more. What is nearest can
# therefore seem at most 2 * 2**-7 |q| = 0.0157 |q| short of the best; the rest is for sums in float32.
_DOUBT = 0.02


class TableFacts:
    """What follows from a (V, d) embedding table alone; computed at first use and kept, for all threads."""

    def __init__(self, table: Tensor) -> None:
        self._table = table
        self._lock = _process.Lock()
        self._centre: Tensor | None = None
        self._inverse_norms: Tensor | None = None
        self._directions: OrderedDict[str, FloatMatrix] = OrderedDict()

    @property
    def centre(self) -> Tensor:
        """(d,) mean of the rows, in float32."""
        with self._lock, torch.inference_mode():
            if self._centre is None:
                # By columns: a reduction in another type copies all that it reduces, and this keeps the sums' order.
                parts = torch.split(self._table, _COLUMNS, dim=1)
                self._centre = torch.cat([part.mean(dim=0, dtype=torch.float32) for part in parts])
            return self._centre

    @property
    def inverse_norms(self) -> Tensor:
        """(V,) one over each row's length, in float32; finite for rows of zeros."""
        with self._lock, torch.inference_mode():
            if self._inverse_norms is None:
                norms = torch.cat([part.float().norm(dim=1) for part in torch.split(self._table, _ROWS)])
                self._inverse_norms = norms.clamp_min(1e-12).reciprocal()
            return self._inverse_norms

    def known_direction(self, word: str) -> FloatMatrix | None:
        """What :meth:`keep_direction` was given for ``word``, if that is not long ago."""
        with self._lock:
            if word in self._directions:
                self._directions.move_to_end(word)
            return self._directions.get(word)

    def keep_direction(self, word: str, direction: FloatMatrix) -> None:
        """Remember the (d,) direction of ``word`` until 256 others were asked for since."""
        with self._lock:
            self._directions[word] = direction
            self._directions.move_to_end(word)
            while len(self._directions) > _WORDS:
                self._directions.popitem(last=False)


class Tokens(Protocol):
    """Tokens and their input embeddings, as a :class:`~tta_middleware.engines.prompt.vocabulary.Vocabulary` has them.

    Attributes:
        table: (V, width) input embeddings.
        facts: what was computed of the table so far.
    """

    tokenizer: Any
    table: Tensor
    width: int
    facts: TableFacts
    device: torch.device
    dtype: torch.dtype


def directions(model: Tokens, words: Sequence[str]) -> FloatMatrix:
    """(n, d) rows of length 1: each word's mean token embedding less the mean of the whole table.

    Raises:
        ConfigurationError: a word is blank.
    """
    if any(not word.strip() for word in words):
        raise ConfigurationError("a direction needs a word, not a blank")
    found = np.zeros((len(words), model.width), dtype=np.float32)
    for row, word in zip(found, words, strict=True):
        row[:] = _direction(model, word)
    return found


def _direction(model: Tokens, word: str) -> FloatMatrix:
    found = model.facts.known_direction(word)
    if found is None:
        ids = model.tokenizer(f" {word.strip()}", add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            # The table itself: some families scale rows on look-up, which would shift them against the mean.
            step = model.table[ids].float().mean(dim=0) - model.facts.centre
            found = torch.nn.functional.normalize(step, dim=0).cpu().numpy()
        model.facts.keep_direction(word, found)
    return found


def nearest_tokens(model: Tokens, rows: FloatMatrix) -> IntVector:
    """For (n, d) rows, the (n,) ids of the nearest input embeddings by cosine, computed in float32."""
    with torch.inference_mode():
        queries = torch.from_numpy(np.ascontiguousarray(rows)).to(model.device, torch.float32)
        blocks = torch.split(queries, max(1, _SCORES // len(model.table)))
        nearest: IntVector = torch.cat([_nearest(model, block) for block in blocks]).cpu().numpy()
    return nearest


def _nearest(model: Tokens, queries: Tensor) -> Tensor:
    table, inverse_norms = model.table, model.facts.inverse_norms
    best = torch.full((len(queries),), -math.inf, device=model.device)
    ids = torch.zeros(len(queries), dtype=torch.long, device=model.device)
    for part in _parts(model, queries):
        scores, found = ((queries @ table[part].float().T) * inverse_norms[part]).max(dim=1)
        token_ids = part[found] if isinstance(part, Tensor) else found + part.start
        better = scores > best
        best, ids = torch.where(better, scores, best), torch.where(better, token_ids, ids)
    return ids


def _parts(model: Tokens, queries: Tensor) -> Iterator[Tensor | slice]:
    """The rows of the table among which the nearest of all (n, d) queries are."""
    if len(queries) and can_pack(model.device, model.dtype):
        yield from torch.split(_shortlist(model, queries), _ROWS)
    else:
        yield from (slice(at, at + _ROWS) for at in range(0, len(model.table), _ROWS))


def _shortlist(model: Tokens, queries: Tensor) -> Tensor:
    """Ids of all rows that may be nearest to one of the queries, by one product in the table's own bfloat16.

    It is ten times as fast as one in float32 and short (one or two rows a query), and no row that is nearest can be
    missing, whatever the queries: where many rows are about as near, it is long.
    """
    scores = (model.table @ queries.to(model.dtype).T) * model.facts.inverse_norms[:, None]
    least = scores.amax(dim=0) - _DOUBT * queries.norm(dim=1)
    # The sign of a difference is exact, and its greatest is found three times as fast as any truth in a comparison.
    return (scores.sub_(least).amax(dim=1) >= 0).nonzero()[:, 0]
