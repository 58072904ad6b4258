"""Recorded steps, as far as they show without a CUDA device: what a recording computes and how it is replayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tta_middleware.engines.decoding.beside import Segment
from tta_middleware.engines.decoding.kv_slots import KVSlots
from tta_middleware.engines.decoding.packed import AnyStep, Pass
from tta_middleware.engines.decoding.recorded import _Recording
from tta_middleware.engines.transformers import TransformersEngine


class Graph:
    """In place of a CUDA graph: computes the step anew whenever it is replayed."""

    def __init__(self, recording: Any, model: Any, slots: KVSlots) -> None:
        self._recording, self._model, self._slots = recording, model, slots

    def replay(self) -> None:
        recording = self._recording
        step = AnyStep(self._slots, recording._lengths, recording._shape)
        recording._logits.copy_(self._model.compute(recording._rows, step))


def recording_of(model: Any, slots: KVSlots) -> _Recording:
    """A recording of a step of these slots, on the CPU."""
    found: Any = object.__new__(_Recording)
    found._shape = slots.rounded()
    count = sum(rows for rows, _ in found._shape)
    found._rows = torch.zeros((1, count, model.width), dtype=model.dtype)
    found._lengths = torch.zeros(count, dtype=torch.long)
    found._logits = torch.zeros((count, len(model.table)), dtype=model.dtype)
    found._graph = Graph(found, model, slots)
    return found


def filled(model: Any, lengths: tuple[int, ...]) -> KVSlots:
    slots = KVSlots(16, model.column_bytes)
    for seed, length in enumerate(lengths):
        segment = Segment(model.token_columns([(seed * 31 + at * 7) % 4000 for at in range(length)]), None, keep=1)
        model.compute(segment.rows[None], Pass(KVSlots(0), [segment]))
        slots.add(segment.prefix())
    return slots


@pytest.mark.parametrize("lengths", [(5, 9, 40), (5, 600, 9), (511, 3, 700, 3, 3), (2100, 3)], ids=str)
async def test_a_replayed_step_gives_what_a_computed_one_gives(tiny_folder: Path, lengths: tuple[int, ...]) -> None:
    engine = TransformersEngine(str(tiny_folder), dtype="float64")
    await engine.load()
    model: Any = engine._loaded
    computed, replayed = filled(model, lengths), filled(model, lengths)
    for turn in range(3):
        rows = model.token_columns([100 + turn * 10 + slot for slot in range(len(lengths))])
        computed.reserve()
        wanted = model.compute(rows[computed.order][None], Pass(computed, []))
        replayed.reserve()
        assert replayed.order == computed.order
        recording = recording_of(model, replayed)
        found = recording.replay(rows[replayed.order][None], replayed.step_lengths, replayed.group_sizes)
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-9)
        computed.advance()
        replayed.advance()
    await engine.aclose()
