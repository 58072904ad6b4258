"""A model that runs by its own forward pass and its own cache, for families that no packed pass can run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tta_middleware.engines.decoding.capacity import is_out_of_memory
from tta_middleware.engines.decoding.check import agree, precision, sample_ids
from tta_middleware.engines.decoding.loaded import LoadedModel
from tta_middleware.engines.decoding.own_cache import NotAlike, OwnCache, side_by_side
from tta_middleware.errors import ConfigurationError

# What families call the cache that they take and give.
_CACHES = ("cache", "past_key_values", "cache_params", "state")


@dataclass(frozen=True, slots=True)
class Abilities:
    """What was found to give the same as the whole sequence in one pass.

    Attributes:
        caches: token by token behind a cache.
        continues: several columns behind a cache, so that a prompt may run in parts and share its beginning.
        batches: sequences of one length side by side.
        pads: sequences of different lengths side by side, the shorter ones behind empty columns.
    """

    caches: bool = False
    continues: bool = False
    batches: bool = False
    pads: bool = False

    def __str__(self) -> str:
        if not self.caches:
            return "its cache does not go on as the whole does, so every token runs the whole sequence again"
        lengths = "of any length" if self.pads else "of one length" if self.batches else ""
        batched = f"sequences {lengths} run side by side" if lengths else "sequences run one at a time"
        return f"{batched}; {'beginnings are shared' if self.continues else 'every prompt runs in one piece'}"


class PlainModel(LoadedModel):
    """A model with its own cache.

    Attributes:
        able: what of batching it can do; everything is tried once, when it is loaded.
        state_bytes: what one sequence keeps beside its columns.
    """

    def __init__(self, model: Any, tokenizer: Any, why: str) -> None:
        super().__init__(model, tokenizer, why)
        self._cache_name = next((name for name in _CACHES if name in self._arguments), None)
        self.able = Abilities()
        self.state_bytes = 0
        # Off for a model whose cache is of no use: filling one may change what a pass gives (layers that run twice).
        self._keeps = True

    def describe(self) -> str:
        return f"{self.why}; {self.able}"

    def run(
        self, columns: Tensor, past: OwnCache | None, keep: int, *, read_layers: Sequence[int] = ()
    ) -> tuple[Tensor, OwnCache, dict[int, Tensor]]:
        """Run (B, T, c) columns behind what has run.

        Returns:
            (B, keep, V) logits of the last columns, the cache of all columns, and (B, keep, d) states after each of
            the layers that are read; none of the last where the logits do not come from the output embedding.
        """
        size, count = columns.shape[:2]
        before = past or OwnCache(None, 0, (0,) * size)
        arguments: dict[str, Any] = {**self._inputs(columns), **self._places(before, count)}
        if "logits_to_keep" in self._arguments:
            arguments["logits_to_keep"] = max(1, keep)
        if self._cache_name is not None and self._keeps:
            arguments |= {"use_cache": True, self._cache_name: before.inner}
        elif "use_cache" in self._arguments:
            arguments["use_cache"] = False
        noted: dict[int, Tensor] = {}
        with torch.inference_mode(), self._noting_states(noted.__setitem__, read_layers):
            out = self.model(**arguments)
        logits: Tensor = out.logits
        after = OwnCache(self._cache_of(out), before.columns + count, before.padding)
        states = {layer: shown[:, shown.shape[1] - keep :] for layer, shown in noted.items()}
        return logits[:, logits.shape[1] - keep :], after, states

    def _places(self, before: OwnCache, count: int) -> dict[str, Tensor]:
        """Each column's place in its sequence, and which columns are empty where there are any."""
        found: dict[str, Tensor] = {}
        end = before.columns + count
        padding = torch.tensor(before.padding, device=self.device)[:, None]
        if "position_ids" in self._arguments:
            found["position_ids"] = torch.arange(before.columns, end, device=self.device)[None] - padding
        if any(before.padding):
            found["attention_mask"] = (torch.arange(end, device=self.device)[None] >= padding).long()
        return found

    def _cache_of(self, out: Any) -> Any:
        return next((out[name] for name in _CACHES if name in out and out[name] is not None), None)

    def look_into_it(self) -> None:
        """Find out what the model can do, on two short sequences; a few dozen columns.

        Raises:
            ConfigurationError: it gives no logits for embeddings, or none that are numbers, or it reads ahead.
        """
        one, other = self.token_columns(sample_ids(self, 9, 1))[None], self.token_columns(sample_ids(self, 9, 7))[None]
        try:
            whole = [self.whole(columns[0]) for columns in (one, other)]
            shorter = self.whole(one[0, :6])
        except (TypeError, ValueError, AttributeError, RuntimeError, NotImplementedError, KeyError) as exc:
            if is_out_of_memory(exc):
                raise
            raise ConfigurationError(f"models of this kind cannot be decoded from embeddings: {exc}") from exc
        if not all(torch.isfinite(logits).all() for logits in whole):
            short = "it needs a wider one, so set dtype to bfloat16 or float32"
            advice = short if self.dtype == torch.float16 else "its weights are broken, so fetch them anew"
            raise ConfigurationError(f"what this model computes in {self.dtype} is not finite; {advice}")
        if not agree(shorter, whole[0][:6], precision(self.model)):
            raise ConfigurationError("models of this kind read ahead; only causal language models write chat answers")
        trial = _Trial(self, (one, other), whole)
        # Where rotary frequencies are picked for all that runs at once, every sequence runs whole and by itself.
        if self.short_range is None and trial.of(trial.steps):
            self.able = Abilities(
                caches=True,
                continues=trial.of(trial.continues),
                batches=trial.of(trial.batches),
                pads=trial.of(trial.batches) and trial.of(trial.pads),
            )
        self._keeps = self.able.caches
        if self._keeps:
            self._measure(one)

    def _measure(self, columns: Tensor) -> None:
        """Bytes by column and by sequence: of a cache of four columns and one of nine."""
        short, long = (self.run(columns[:, :count], None, 1)[1].nbytes for count in (4, 9))
        self.column_bytes = max(0, (long - short) // 5)
        self.state_bytes = max(0, short - 4 * self.column_bytes)


class _Trial:
    """Ways of running two sequences of nine columns, held against the whole of each in one pass."""

    def __init__(self, model: PlainModel, columns: Sequence[Tensor], whole: Sequence[Tensor]) -> None:
        self._model, self._columns, self._whole = model, columns, whole

    def of(self, way: Any) -> bool:
        """Whether a way gives the same; one that fails does not."""
        try:
            return bool(way())
        except (NotAlike, TypeError, ValueError, AttributeError, RuntimeError, NotImplementedError, KeyError) as exc:
            if is_out_of_memory(exc):
                raise
            return False

    def _begun(self, which: int, count: int) -> OwnCache:
        """The cache of the first columns.

        Raises:
            NotAlike: filling it changed what the pass gives.
        """
        logits, cache, _ = self._model.run(self._columns[which][:, :count], None, 1)
        if not self._same(which, count - 1, logits[0, 0]):
            raise NotAlike("a pass that fills a cache gives something else than one that does not")
        return cache

    def _same(self, which: int, at: int, logits: Tensor) -> bool:
        return agree(logits, self._whole[which][at], precision(self._model.model))

    def steps(self) -> bool:
        """Six columns, then one after the other; beside them a second sequence that must not disturb."""
        past = self._begun(0, 6)
        if past.inner is None:
            return False
        self._begun(1, 5)
        for at in range(6, 9):
            logits, past, _ = self._model.run(self._columns[0][:, at : at + 1], past, 1)
            if not self._same(0, at, logits[0, 0]):
                return False
        return True

    def continues(self) -> bool:
        """Four columns, whose cache is copied, then five; twice, so that a copy that is none shows."""
        begun = self._begun(0, 4)
        for _ in range(2):
            logits, _, _ = self._model.run(self._columns[0][:, 4:], begun.select([0]), 5)
            if not all(self._same(0, 4 + at, logits[0, at]) for at in range(5)):
                return False
        return True

    def batches(self) -> bool:
        """Both of one length side by side, then the second alone."""
        both = side_by_side([self._begun(0, 6), self._begun(1, 6)])
        return self._go_on(both, (6, 6))

    def pads(self) -> bool:
        """The second is three columns shorter; in the end the padding of what is left is dropped."""
        both = side_by_side([self._begun(0, 7), self._begun(1, 4).padded(7)])
        return self._go_on(both, (7, 4))

    def _go_on(self, both: OwnCache, at: tuple[int, int]) -> bool:
        columns = torch.cat([self._columns[which][:, at[which] : at[which] + 1] for which in (0, 1)])
        logits, both, _ = self._model.run(columns, both, 1)
        if not all(self._same(which, at[which], logits[which, 0]) for which in (0, 1)):
            return False
        left = both.select([1])
        left = left.trimmed() if any(left.padding) else left
        logits, _, _ = self._model.run(self._columns[1][:, at[1] + 1 : at[1] + 2], left, 1)
        return self._same(1, at[1] + 1, logits[0, 0])
