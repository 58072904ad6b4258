"""Prompts and texts that run beside the decode step: in one kernel or one by one, and how often, they get the same."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tta_middleware.engines.decoding import columns, flash, running_batch
from tta_middleware.engines.decoding.beside import Segment
from tta_middleware.engines.decoding.columns import Columns
from tta_middleware.engines.decoding.flash import Flash
from tta_middleware.engines.decoding.kv_slots import KVSlots, Prefix
from tta_middleware.engines.decoding.packed import Pass
from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.types import GenerationRequest, Message, Sampling

PLANS = [[(0, 5)], [(7, 3), (0, 9), (7, 1)], [(12, 6), (4, 4), (0, 1), (12, 2)]]
"""For each segment how many of its columns have run, and how many run now."""


def kernel(
    query: Any, keys: Any, values: Any, asked: Any, seen: Any, _most_asked: int, _most_seen: int, *rest: Any, scale: Any
) -> tuple[torch.Tensor]:
    """What the GPU's kernel computes, sequence by sequence: causal, aligned to each one's last column."""
    assert rest == (0.0, True, False)
    assert [ends.dtype for ends in (asked, seen)] == [torch.int32] * 2
    parts, groups = [], query.shape[1] // keys.shape[1]
    for at in range(len(asked) - 1):
        mine, all_of_it = slice(asked[at], asked[at + 1]), slice(seen[at], seen[at + 1])
        q, k, v = (heads.transpose(0, 1) for heads in (query[mine], keys[all_of_it], values[all_of_it]))
        k, v = (heads.repeat_interleave(groups, dim=0) for heads in (k, v))
        later = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(k.shape[1] - q.shape[1] + 1)
        logits = (q @ k.mT) * (scale or q.shape[-1] ** -0.5)
        parts.append((logits.masked_fill(later, -torch.inf).softmax(dim=-1) @ v).transpose(0, 1))
    return (torch.cat(parts),)


async def loaded(folder: Path, **options: Any) -> tuple[TransformersEngine, Any]:
    engine = TransformersEngine(str(folder), **options)
    await engine.load()
    return engine, engine._loaded


async def with_kernel(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[TransformersEngine, Any]:
    """A model on the CPU that asks for the GPU's kernel, in a type that shows every difference."""
    engine, model = await loaded(folder, dtype="float64")
    monkeypatch.setattr(flash, "_TYPES", (torch.float64,))
    model._flash = Flash()
    return engine, model


def planned(model: Any, plan: list[tuple[int, int]]) -> list[Segment]:
    """Segments of sequences that have run in part, one alone and then all together."""
    found = []
    for seed, (before, now) in enumerate(plan):
        rows = model.token_columns([(seed * 31 + at * 7) % 4000 for at in range(before + now)])
        past: Prefix | None = None
        if before:
            begun = Segment(rows[:before], None, keep=1)
            model.compute(begun.rows[None], Pass(KVSlots(0), [begun]))
            past = begun.prefix()
        found.append(Segment(rows[before:], past, keep=now))
    return found


def run(model: Any, segments: list[Segment]) -> torch.Tensor:
    logits: torch.Tensor = model.compute(
        torch.cat([segment.rows for segment in segments])[None], Pass(KVSlots(0), segments)
    )
    return logits


@pytest.mark.parametrize("plan", PLANS, ids=str)
async def test_one_kernel_gives_what_one_by_one_gives(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, plan: list[tuple[int, int]]
) -> None:
    engine, model = await with_kernel(tiny_folder, monkeypatch)
    model._flash, kept = None, model._flash
    one_by_one, together = planned(model, plan), planned(model, plan)
    wanted = run(model, one_by_one)
    model._flash = kept
    asked: list[int] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        asked.append(1)
        return kernel(*arguments, **options)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", counted)
    found = run(model, together)
    assert len(asked) == model.layers
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-9)
    for one, other in zip(one_by_one, together, strict=True):
        ours, theirs = one.prefix().whole(), other.prefix().whole()
        assert ours.length == theirs.length
        for blocks in zip(ours.columns.blocks, theirs.columns.blocks, strict=True):
            assert torch.allclose(*blocks, rtol=1e-9, atol=1e-9)
    await engine.aclose()


async def test_without_the_kernel_each_is_computed_by_itself(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, without = await loaded(tiny_folder, dtype="float64")
    wanted = run(without, planned(without, PLANS[1]))
    await plain.aclose()
    # This torch has it for GPUs alone, as a torch without it has it for none.
    engine, model = await with_kernel(tiny_folder, monkeypatch)
    assert torch.equal(run(model, planned(model, PLANS[1])), wanted)
    assert not model._flash.possible
    await engine.aclose()


async def test_memory_that_runs_out_in_the_kernel_is_no_reason_to_do_without(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, model = await with_kernel(tiny_folder, monkeypatch)
    segments = planned(model, PLANS[0])

    def scarce(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", scarce)
    with pytest.raises(torch.OutOfMemoryError):
        run(model, segments)
    assert model._flash.possible
    await engine.aclose()


class NeverRecords:
    """In place of a recorder of CUDA graphs: computes every step, and lets texts wait as one that replays."""

    possible = True

    def step(self, _rows: Any, _packed: Any) -> None:
        return None

    def forget(self) -> None: ...


async def test_where_steps_are_replayed_prompts_and_texts_run_with_every_fourth(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, model = await loaded(tiny_folder, dtype="float64")
    plain, _ = await loaded(tiny_folder, dtype="float64")
    prompts = [await engine.embed([Message("user", "word " * count)]) for count in (3, 40, 9, 21, 14)]
    requests = [GenerationRequest(prompt, Sampling(24, 0.0)) for prompt in prompts]
    ids = [[(7 * at) % 4000 + 5 for at in range(count)] for count in (5, 30, 12)]
    wanted = await plain.generate_batch(requests), await plain.mean_nll(prompts[0], ids)
    monkeypatch.setattr(model, "recorder", NeverRecords())
    passes: list[tuple[int, int]] = []
    real = running_batch.Batch._forward

    def noted(batch: Any, slots: KVSlots, segments: list[Segment]) -> torch.Tensor:
        passes.append((len(slots.lengths), len(segments)))
        return real(batch, slots, segments)

    monkeypatch.setattr(running_batch.Batch, "_forward", noted)
    scores: list[float] = []

    async def score_later() -> None:
        while len(passes) < 6:
            await anyio.lowlevel.checkpoint()
        scores.extend(await engine.mean_nll(prompts[0], ids))

    async with anyio.create_task_group() as group:
        group.start_soon(score_later)
        done = await engine.generate_batch(requests)
    assert [completion.token_ids for completion in done] == [completion.token_ids for completion in wanted[0]]
    assert scores == pytest.approx(wanted[1], rel=1e-9)
    beside = [at for at, (slots, segments) in enumerate(passes) if slots and segments]
    assert all(later - earlier >= 4 for earlier, later in itertools.pairwise(beside))
    assert len(passes) - len(beside) > 12
    await engine.aclose()
    await plain.aclose()


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=5), st.data())
def test_columns_hold_every_layer_whatever_its_shape(layers: list[tuple[int, int]], data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 9))
    start = data.draw(st.integers(0, length))
    end = data.draw(st.integers(start, length))
    pairs = [(torch.randn(1, heads, length, size), torch.randn(1, heads, length, size + 1)) for heads, size in layers]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "_BLOCK_TENSORS", data.draw(st.integers(1, 4)))
        whole = Columns.of(pairs)
    assert (len(whole), whole.count) == (len(layers), length)
    assert whole.nbytes == sum(keys.nbytes + values.nbytes for keys, values in pairs)
    parts = [whole.part(0, start), whole.part(start, end).copied(), whole.part(end, length), whole.layout.gap(2)]
    for (keys, values), (found, more) in zip(pairs, Columns.joined(parts), strict=True):
        assert torch.equal(found[:, :, :length], keys)
        assert torch.equal(more[:, :, :length], values)
        assert found.shape[2] == length + 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("plan", PLANS, ids=str)
async def test_a_gpu_has_the_kernel(tiny_folder: Path, plan: list[tuple[int, int]]) -> None:
    engine, model = await loaded(tiny_folder, dtype="bfloat16", device="cuda")
    kept, model._flash = model._flash, None
    wanted = run(model, planned(model, plan)).float()
    model._flash = kept
    found = run(model, planned(model, plan)).float()
    assert kept.possible
    assert (found - wanted).norm() < 0.02 * wanted.norm()
    await engine.aclose()
