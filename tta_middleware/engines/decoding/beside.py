"""What runs beside the decode step: columns of prompts and of texts that are scored, in one pass.

Keys and values of all of them, those of their beginnings included, lie one behind the other in one buffer for the pass.
On a CPU each segment's attention is a call of its own, on a GPU one kernel takes them all (:mod:`.flash`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from tta_middleware.engines.decoding.attention import AttentionSettings, bias_of, repeated
from tta_middleware.engines.decoding.columns import Columns, Layout, Pair
from tta_middleware.engines.decoding.flash import Flash, Lengths, widest
from tta_middleware.engines.decoding.kv_slots import Prefix
from tta_middleware.engines.decoding.sight import Sight


class Segment:
    """Some columns (t, d) of one sequence, behind the prefix that has run already.

    Attributes:
        keep: of how many of its last columns the logits are wanted.
        read_layers: layers whose states at these columns are wanted as well.
        read_spans: in place of states, the means of what these layers keep as values of the sequence's columns, each
            from its first number to before its second.
        states: per layer (keep, d) of them, once the pass has run; (s, v) of s spans.
        long: its sequence is longer than the model's short range; see :mod:`.rotary`.
        ran: keys and values of these columns, once the pass has run.
    """

    def __init__(
        self,
        rows: Tensor,
        past: Prefix | None,
        keep: int,
        *,
        read_layers: Sequence[int] = (),
        read_spans: Sequence[tuple[int, int]] = (),
        long: bool = False,
    ) -> None:
        self.rows, self.past, self.keep, self.long = rows, past, keep, long
        self.count = rows.shape[0]
        self.read_layers = tuple(read_layers) if keep else ()
        self.read_spans = tuple(read_spans)
        self.states: dict[int, Tensor] = {}
        self.ran: Columns | None = None

    @property
    def start(self) -> int:
        """Its first column's place in the sequence."""
        return self.past.length if self.past else 0

    @property
    def end(self) -> int:
        return self.start + self.count

    def prefix(self) -> Prefix:
        """All its columns, for what follows.

        Raises:
            RuntimeError: they have not run.
        """
        if self.ran is None:
            raise RuntimeError("a segment has a prefix once its pass has run")
        return Prefix(self.ran, self.end, self.past)


class Beside:
    """The segments of one pass, layer by layer; used by the decode thread alone.

    Args:
        segments: at least one.
        layout: how the model's keys and values lie; None while that is to be found out, by one segment without a past.
        flash: the kernel that takes them all; None where each is computed by itself.
    """

    def __init__(self, segments: Sequence[Segment], layout: Layout | None, flash: Flash | None = None) -> None:
        self._segments, self._flash = segments, flash
        self._asked = [0, *accumulate(segment.count for segment in segments)]
        self._ends = [0, *accumulate(segment.end for segment in segments)]
        self._longest = widest(self._ends)
        self._all = None if layout is None else _laid_out(segments, layout)
        self._found: list[Pair] = []
        self._masks: dict[tuple[Sight, int], Tensor] = {}
        self._places: Tensor | None = None
        self._lengths: Lengths | None = None

    def attend(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, settings: AttentionSettings) -> Tensor:
        """(T, H, D) for their (1, H, T, D) queries, each over its own sequence's columns up to its own."""
        keys, values = self._written(layer, keys, values)
        self._read_spans(layer, values)
        if self._flash is not None and self._flash.takes(query, settings, self._longest):
            self._lengths = self._lengths or Lengths.of(self._asked, self._ends, query.device)
            if (out := self._flash.attention(query, keys, values, self._lengths, settings)) is not None:
                return out
        parts = [self._alone(at, query, keys, values, settings) for at in range(len(self._segments))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def done(self) -> Layout:
        """Give each segment what it has left, in memory of its own."""
        found = Columns.of(self._found) if self._all is None else self._all
        for segment, end in zip(self._segments, self._ends[1:], strict=True):
            whole = segment.count == found.count
            segment.ran = found if whole else found.part(end - segment.count, end).copied()
        return found.layout

    def _written(self, layer: int, keys: Tensor, values: Tensor) -> Pair:
        """All columns' keys and values, with those of the new ones among them."""
        if self._all is None:
            self._found.append((keys, values))
            return keys, values
        all_keys, all_values = self._all[layer]
        if len(self._segments) == 1:
            new = slice(self._segments[0].start, None)
            all_keys[:, :, new], all_values[:, :, new] = keys, values
        else:
            places = self._new_places(keys.device)
            all_keys.index_copy_(2, places, keys)
            all_values.index_copy_(2, places, values)
        return all_keys, all_values

    def _new_places(self, device: torch.device) -> Tensor:
        """(T,) where the new columns stand among all."""
        if self._places is None:
            new = [
                place
                for segment, end in zip(self._segments, self._ends[1:], strict=True)
                for place in range(end - segment.count, end)
            ]
            self._places = torch.tensor(new, device=device)
        return self._places

    def _read_spans(self, layer: int, values: Tensor) -> None:
        """Note the means of values that segments want of this layer."""
        for segment, first in zip(self._segments, self._ends, strict=False):
            if segment.read_spans and layer + 1 in segment.read_layers:
                spans = [slice(first + start, first + end) for start, end in segment.read_spans]
                means = [values[0, :, span].float().mean(dim=1).flatten() for span in spans]
                segment.states[layer + 1] = torch.stack(means)

    def _alone(self, at: int, query: Tensor, keys: Tensor, values: Tensor, settings: AttentionSettings) -> Tensor:
        """(t, H, D) of one segment's columns."""
        mine, seen = slice(*self._asked[at : at + 2]), slice(*self._ends[at : at + 2])
        groups = query.shape[1] // keys.shape[1]
        out = settings.attention(
            query[:, :, mine],
            repeated(keys[:, :, seen], groups),
            repeated(values[:, :, seen], groups),
            self._mask(settings.sight, at, query),
        )
        return out[0].transpose(0, 1)

    def _mask(self, sight: Sight, at: int, like: Tensor) -> Tensor:
        if (sight, at) not in self._masks:
            segment = self._segments[at]
            places = torch.arange(segment.end, device=like.device)
            self._masks[sight, at] = bias_of(sight.seen(places[None], places[segment.start :, None]), like)[None, None]
        return self._masks[sight, at]


def _laid_out(segments: Sequence[Segment], layout: Layout) -> Columns:
    """Room for all columns, with those filled in that have run."""
    pieces: list[Columns] = []
    for segment in segments:
        pieces += segment.past.pieces() if segment.past is not None else []
        pieces.append(layout.gap(segment.count))
    if len(pieces) == 1:
        pieces.append(layout.gap(0))
    return Columns.joined(pieces)
