"""The running batch: rows join by prefill, take one token per step, and leave when they are finished."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tta_middleware.engines.kv_cache import SlabCache, slab_from
from tta_middleware.engines.loaded import LoadedModel
from tta_middleware.engines.prefill import columns, prefill
from tta_middleware.engines.row import Row
from tta_middleware.engines.sampling import next_tokens, seeded
from tta_middleware.errors import EngineError


class Batch:
    """Rows that decode side by side; used by the decode thread alone.

    Attributes:
        rows: the sequences that are being decoded, in cache order.
    """

    def __init__(self, model: LoadedModel) -> None:
        self.rows: list[Row] = []
        self._generators: list[torch.Generator | None] = []
        self._model = model
        self._slab: SlabCache | None = None

    def join(self, rows: Sequence[Row]) -> None:
        """Prefill new rows and give each its first token; leaves the batch as it was if that fails."""
        ready = prefill(self._model, [row.request.prompt.matrix for row in rows])
        generators = [seeded(row.request.sampling) for row in rows]
        tokens = _choose(ready.logits, rows, generators)
        if self._slab is None:
            self._slab = slab_from(ready.cache, ready.first)
        else:
            self._slab = self._slab.joined(ready.cache, ready.first)
        self.rows += rows
        self._generators += generators
        self._hand_out(rows, tokens)

    def step(self) -> None:
        """One token for every row."""
        slab = self._slab
        if slab is None:
            return
        slab.reserve()
        last = self._model.look_up([row.token_ids[-1] for row in self.rows])[:, None]
        mask, positions = columns(slab.first, slab.start, slab.end + 1, 1, self._model.device)
        logits = self._model.forward(last, mask=mask, positions=positions, cache=slab.cache)
        slab.advance()
        self._hand_out(self.rows, _choose(logits[:, -1], self.rows, self._generators))

    def drop_cancelled(self) -> None:
        """Let go of the rows that were cancelled."""
        for row in self.rows:
            if row.cancelled and not row.finished:
                row.finish("aborted")
        self.drop_finished()

    def fail(self, cause: BaseException) -> None:
        """Tell every row of ``cause`` and start over empty."""
        for row in self.rows:
            row.fail(cause)
        self.drop_finished()

    def _hand_out(self, rows: Sequence[Row], tokens: Sequence[int | None]) -> None:
        for row, token in zip(rows, tokens, strict=True):
            if token is None:
                row.fail(EngineError("the model's output is not finite; are the embeddings too far out?"))
            else:
                row.accept(token, self._model.eos_ids)
        self.drop_finished()

    def drop_finished(self) -> None:
        """Free the rows that have ended, then announce their ends."""
        ended = [row for row in self.rows if row.finished]
        if len(ended) == len(self.rows):
            self.rows, self._generators, self._slab = [], [], None
        for index in range(len(self.rows) - 1, -1, -1):
            if self.rows[index].finished:
                self._remove(index)
        for row in ended:
            row.announce()

    def _remove(self, index: int) -> None:
        if self._slab is not None:
            self._slab.remove(index)
        row, generator = self.rows.pop(), self._generators.pop()
        if index < len(self.rows):
            self.rows[index], self._generators[index] = row, generator


def _choose(logits: Tensor, rows: Sequence[Row], generators: Sequence[torch.Generator | None]) -> list[int | None]:
    with torch.inference_mode():
        return next_tokens(logits, [row.request.sampling for row in rows], generators)
