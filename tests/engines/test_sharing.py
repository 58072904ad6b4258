"""Memory, shared beginnings and places, on a tiny model where batch and single agree exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest

from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.errors import ConfigurationError, EngineBusyError, EngineError
from tta_middleware.types import Completion, GenerationRequest, Message, PromptEmbeddings, Sampling, next_ticket

SYSTEM = Message("system", "Answer in the words of a lighthouse keeper who has seen many ships come and go. " * 2)


def request(prompt: PromptEmbeddings, tokens: int, **options: Any) -> GenerationRequest:
    return GenerationRequest(prompt, Sampling(max_new_tokens=tokens, temperature=0.8, seed=3), **options)


async def alone(folder: Path, prompts: list[PromptEmbeddings], tokens: int) -> list[tuple[int, ...]]:
    """What each prompt gives when nothing else ever ran."""
    answers = []
    for prompt in prompts:
        engine = TransformersEngine(str(folder), dtype="float64")
        [done] = await engine.generate_batch([request(prompt, tokens)])
        answers.append(done.token_ids)
        await engine.aclose()
    return answers


async def test_a_beginning_that_many_prompts_share_runs_once(
    tiny_folder: Path, count_columns: Callable[[TransformersEngine], list[int]]
) -> None:
    engine = TransformersEngine(str(tiny_folder), dtype="float64")
    texts = ["a storm", "the fog", "gulls", "the fog"]
    prompts = [await engine.embed([SYSTEM, Message("user", text)]) for text in texts]
    head = int(prompts[0].user_mask.argmax())
    columns = count_columns(engine)
    done = await engine.generate_batch([request(prompt, 3) for prompt in prompts])
    assert columns[0] == head
    assert sum(columns) == head + sum(len(prompt.matrix) - head for prompt in prompts) + 4 * 2
    del columns[:]
    await engine.mean_nll(prompts[1], [done[0].token_ids, done[1].token_ids])
    # The second completion waits for the prompt that the first one runs, and goes on from its last row.
    assert sum(columns) == len(prompts[1].matrix) - head + 2 + 1 + 2
    await engine.aclose()
    assert [completion.token_ids for completion in done] == await alone(tiny_folder, prompts, 3)


async def test_a_beginning_with_other_embeddings_is_another_beginning(tiny_folder: Path) -> None:
    engine = TransformersEngine(str(tiny_folder), dtype="float64")
    prompt = await engine.embed([SYSTEM, Message("user", "the fog")])
    moved = prompt.matrix.copy()
    moved[5] += 0.5
    both = [prompt, prompt.moved(moved)]
    done = [(await engine.generate_batch([request(one, 12)]))[0].token_ids for one in both]
    await engine.aclose()
    assert done == await alone(tiny_folder, both, 12)
    assert done[0] != done[1]


async def test_a_long_prompt_runs_in_parts_between_the_steps_of_others(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, count_columns: Callable[[TransformersEngine], list[int]]
) -> None:
    import tta_middleware.engines.decoding.running_batch as batch

    monkeypatch.setattr(batch, "_STEP_TOKENS", 40)
    engine = TransformersEngine(str(tiny_folder), dtype="float64")
    long = await engine.embed([SYSTEM, Message("user", "waves and more waves, " * 30)])
    short = await engine.embed([Message("user", "Hi")])
    columns = count_columns(engine)
    done = await engine.generate_batch([request(short, 30), request(long, 4)])
    assert max(columns) <= 40 + 2
    [score] = await engine.mean_nll(long, [done[0].token_ids])
    await engine.aclose()
    assert [completion.token_ids for completion in done] == [
        (await alone(tiny_folder, [short], 30))[0],
        (await alone(tiny_folder, [long], 4))[0],
    ]
    monkeypatch.undo()
    whole = TransformersEngine(str(tiny_folder), dtype="float64")
    assert [score] == pytest.approx(await whole.mean_nll(long, [done[0].token_ids]), rel=1e-6)
    await whole.aclose()


@pytest.mark.parametrize("fails_at", [5, *(pytest.param(at, marks=pytest.mark.slow) for at in (1, 3, 7, 9, 11))])
@pytest.mark.slow
async def test_for_want_of_memory_sequences_begin_again_and_end_alike(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    engine = TransformersEngine(str(tiny_folder), dtype="float64", max_batch=6)
    prompts = [await engine.embed([SYSTEM, Message("user", "word " * count)]) for count in (1, 9, 3, 20, 5, 2)]
    forward, calls = engine._loaded.forward, []

    def scarce(rows: Any, packed: Any) -> Any:
        calls.append(rows.shape[1])
        if len(calls) in (fails_at, fails_at + 1):
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 99 bytes")
        return forward(rows, packed)

    monkeypatch.setattr(engine._loaded, "forward", scarce)
    done: list[Completion] = []
    streamed: list[str] = []

    async def stream() -> None:
        streamed.append("".join([delta.text async for delta in engine.stream(request(prompts[0], 15))]))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stream)
        done += await engine.generate_batch([request(prompt, 15) for prompt in prompts[1:]])
    stats = engine.stats()
    await engine.aclose()
    assert len(calls) > fails_at
    expected = await alone(tiny_folder, prompts, 15)
    assert [completion.token_ids for completion in done] == expected[1:]
    fresh = TransformersEngine(str(tiny_folder), dtype="float64")
    [first] = await fresh.generate_batch([request(prompts[0], 15)])
    await fresh.aclose()
    assert streamed == [first.text]
    assert stats.set_aside > 0


@pytest.mark.parametrize(
    ("place", "fails_at"),
    [("Slots.reserve", 4), ("_zeros", 6)]
    + [
        pytest.param(place, at, marks=pytest.mark.slow)
        for place, at in [
            *[(place, 4) for place in ("Slots.add", "look_up", "_choose")],
            *[(place, 1) for place in ("Slots.add", "Slots.reserve", "look_up", "_choose")],
            *[("_zeros", at) for at in (2, 5, 7, 8)],
        ]
    ],
)
async def test_memory_may_run_out_anywhere(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, place: str, fails_at: int
) -> None:
    import tta_middleware.engines.decoding.columns as columns
    import tta_middleware.engines.decoding.kv_slots as slots
    import tta_middleware.engines.decoding.running_batch as batch

    monkeypatch.setattr(columns, "_BLOCK_TENSORS", 1)  # several blocks, as larger models have
    engine = TransformersEngine(str(tiny_folder), dtype="float64", max_batch=6)
    prompts = [await engine.embed([SYSTEM, Message("user", "word " * count)]) for count in (1, 9, 3, 20)]
    owners = {"look_up": engine._loaded, "_choose": batch, "_zeros": slots}
    owner = owners.get(place, batch.KVSlots)
    name, calls = place.removeprefix("Slots."), []
    real = getattr(owner, name)

    def scarce(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == fails_at:
            raise MemoryError
        return real(*arguments)

    monkeypatch.setattr(owner, name, scarce)
    done = await engine.generate_batch([request(prompt, 9) for prompt in prompts])
    await engine.aclose()
    monkeypatch.undo()
    assert len(calls) > fails_at
    assert [completion.token_ids for completion in done] == await alone(tiny_folder, prompts, 9)


async def test_memory_that_never_suffices_is_an_error_that_says_so(
    tiny: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = await tiny.embed([Message("user", "Hi")])
    await tiny.load()

    def none_left(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(tiny._loaded, "forward", none_left)
    with pytest.raises(EngineError, match="out of memory with a single sequence"):
        await tiny.generate_batch([request(prompt, 3)])


@pytest.mark.slow
async def test_sequences_that_do_not_fit_into_memory_wait(tiny_folder: Path) -> None:
    narrow = TransformersEngine(str(tiny_folder), dtype="float64")
    await narrow.load()
    prompts = [await narrow.embed([SYSTEM, Message("user", "word " * count)]) for count in range(1, 9)]
    longest = max(len(prompt.matrix) for prompt in prompts)
    room_for_three = 3.5 * longest * narrow._loaded.column_bytes / 2**30
    await narrow.aclose()
    engine = TransformersEngine(str(tiny_folder), dtype="float64", cache_gib=room_for_three)
    most = 0
    done: list[Completion] = []

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, engine.stats().active)
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch)
        done += await engine.generate_batch([request(prompt, 12) for prompt in prompts])
        tasks.cancel_scope.cancel()
    await engine.aclose()
    assert 1 <= most <= 3
    assert [completion.token_ids for completion in done] == await alone(tiny_folder, prompts, 12)


@pytest.mark.parametrize(
    ("lengths", "most"),
    [
        ((1, 300, 1, 2), 2),
        pytest.param((300, 1, 1, 1), 3, marks=pytest.mark.slow),
        pytest.param((1, 1, 1, 1, 1, 1), 5, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.slow
async def test_sequences_that_come_at_once_keep_to_the_memory_of_all_of_them(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...], most: int
) -> None:
    from tta_middleware.engines.decoding import running_batch

    narrow = TransformersEngine(str(tiny_folder), dtype="float64")
    prompts = [await narrow.embed([Message("user", "word " * count)]) for count in lengths]
    await narrow.load()
    room = 5 * 128 * narrow._loaded.column_bytes
    await narrow.aclose()
    # Texts that are scored have 6% of it.
    engine = TransformersEngine(str(tiny_folder), dtype="float64", cache_gib=room / 0.939 / 2**30, prefix_cache_gib=0.0)
    held: list[tuple[int, int]] = []
    reserve = running_batch.KVSlots._reserve

    def measured(slots: running_batch.KVSlots, group: Any, wanted: int, *rest: Any) -> None:
        reserve(slots, group, wanted, *rest)
        held.append((wanted, slots.nbytes + (0 if group in slots._groups else group.nbytes)))

    monkeypatch.setattr(running_batch.KVSlots, "_reserve", measured)
    done = await engine.generate_batch([request(prompt, 12) for prompt in prompts])
    await engine.aclose()
    assert all(size <= room for slots, size in held if slots > 1)
    # The long one takes three blocks of the five that there are; what fits side by side runs side by side.
    assert max(slots for slots, _ in held) == most
    assert engine.stats().set_aside == 0
    assert [completion.token_ids for completion in done] == await alone(tiny_folder, prompts, 12)


@pytest.mark.slow
async def test_sequences_of_all_lengths_end_as_they_do_alone(tiny_folder: Path) -> None:
    engine = TransformersEngine(str(tiny_folder), dtype="float64")
    # Some are just below 512 columns, beyond which a sequence moves to wider buffers while it is decoded.
    prompts = [await engine.embed([Message("user", "word " * count)]) for count in (1, 470, 30, 480, 9)]
    done = await engine.generate_batch([request(prompt, 30) for prompt in prompts])
    await engine.aclose()
    assert min(abs(len(prompt.matrix) + 15 - 512) for prompt in prompts) < 15
    assert [completion.token_ids for completion in done] == await alone(tiny_folder, prompts, 30)


async def test_a_single_stream_does_not_wait_behind_a_large_batch(tiny_folder: Path) -> None:
    engine = TransformersEngine(str(tiny_folder), dtype="float64", max_batch=2)
    prompt = await engine.embed([Message("user", "Hi")])
    order: list[str] = []

    async def bulk() -> None:
        await engine.generate_batch([request(prompt, 12) for _ in range(40)])
        order.append("bulk")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bulk)
        while engine.stats().queued == 0:
            await anyio.lowlevel.checkpoint()
        async for _ in engine.stream(request(prompt, 3)):
            pass
        order.append("single")
        queued = engine.stats().queued
    await engine.aclose()
    assert order == ["single", "bulk"]
    assert queued >= 30


async def test_a_repair_of_an_earlier_request_waits_for_answers_that_have_not_begun(tiny_folder: Path) -> None:
    engine = TransformersEngine(str(tiny_folder), dtype="float64", max_batch=1)
    prompt = await engine.embed([Message("user", "Hi")])
    early, late = next_ticket(), next_ticket()
    order: list[str] = []

    async def ask(name: str, ticket: int, tokens: int) -> None:
        await engine.generate_batch([request(prompt, tokens, ticket=ticket)])
        order.append(name)

    async def queued(count: int) -> None:
        while engine.stats().queued < count:
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask, "at work", next_ticket(), 60)
        while engine.stats().active == 0:
            await anyio.lowlevel.checkpoint()
        tasks.start_soon(ask, "an answer", late, 3)
        await queued(1)
        tasks.start_soon(ask, "a repair", early, 3)
        await queued(2)
        tasks.start_soon(ask, "a later answer", next_ticket(), 3)
        await queued(3)
    await engine.aclose()
    assert order == ["at work", "an answer", "a repair", "a later answer"]


async def test_a_full_queue_refuses_what_comes_and_serves_what_waits(tiny_folder: Path) -> None:
    engine = TransformersEngine(str(tiny_folder), max_batch=1, max_waiting=2)
    prompt = await engine.embed([Message("user", "Hi")])
    done: list[Completion] = []

    async def fill() -> None:
        done.extend(await engine.generate_batch([request(prompt, 40)]))

    async def wait() -> None:
        done.extend(await engine.generate_batch([request(prompt, 3), request(prompt, 3)]))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(fill)
        while engine.stats().active == 0:
            await anyio.lowlevel.checkpoint()
        tasks.start_soon(wait)
        while engine.stats().queued < 2:
            await anyio.lowlevel.checkpoint()
        with pytest.raises(EngineBusyError, match="max_waiting"):
            await engine.generate_batch([request(prompt, 3)])
        with pytest.raises(EngineBusyError):
            async for _ in engine.stream(request(prompt, 3)):
                pass
    assert len(done) == 3
    await engine.aclose()


@pytest.mark.parametrize("share_kept", [1.0, 0.25])
@pytest.mark.slow
async def test_sequences_beginnings_and_scored_texts_keep_to_one_bound_together(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, share_kept: float
) -> None:
    from tta_middleware.engines.decoding.running_batch import Batch

    engine = TransformersEngine(str(tiny_folder), dtype="float64")
    prompts = [await engine.embed([SYSTEM, Message("user", f"{count} word" * count)]) for count in range(13, 35)]
    await engine.load()
    room = 24 * 128 * engine._loaded.column_bytes
    await engine.aclose()
    held: list[tuple[int, int, int]] = []
    turn = Batch.turn

    def measured(batch: Batch) -> int:
        tokens = turn(batch)
        held.append((batch._slots.nbytes, batch.kept_bytes, batch._scored.nbytes))
        return tokens

    monkeypatch.setattr(Batch, "turn", measured)
    gib = room / 2**30
    engine = TransformersEngine(str(tiny_folder), dtype="float64", cache_gib=gib, prefix_cache_gib=gib * share_kept)
    for _ in range(2):
        for prompt in prompts:
            await engine.generate_batch([request(prompt, 12)])
        for prompt in prompts:
            await engine.mean_nll(prompt, [range(10)])
    await engine.generate_batch([request(prompt, 12) for prompt in prompts])
    await engine.aclose()
    assert max(map(sum, held)) <= room
    slots, kept, scored = (max(sizes) for sizes in zip(*held, strict=True))
    # Each of them has been there, and together their most would not have fitted.
    assert min(slots, kept, scored) > 0
    assert kept <= share_kept * room
    if share_kept == 1.0:
        assert slots + kept + scored > room


@pytest.mark.parametrize("options", [{"max_waiting": 0}, {"cache_gib": 0.0}, {"cache_gib": float("nan")}])
def test_settings_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        TransformersEngine(**options)


async def test_closing_fails_what_waits_to_be_scored(tiny: TransformersEngine) -> None:
    prompt = await tiny.embed([Message("user", "Hi")])
    await tiny.load()
    await tiny.aclose()
    with pytest.raises(EngineError, match="closed"):
        await tiny.mean_nll(prompt, [[1, 2]])


async def test_many_scores_at_once_equal_each_alone(tiny: TransformersEngine) -> None:
    prompt = await tiny.embed([SYSTEM, Message("user", "the fog")])
    rng = np.random.default_rng(0)
    texts = [rng.integers(5, 4000, count).tolist() for count in (1, 2, 17, 60)]
    together = await tiny.mean_nll(prompt, [*texts, []])
    single = [(await tiny.mean_nll(prompt, [text]))[0] for text in texts]
    assert together[:-1] == pytest.approx(single, rel=1e-6)
    assert np.isnan(together[-1])


async def test_memory_for_few_columns_at_a_time_still_gets_long_prompts_done(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TransformersEngine(str(tiny_folder), dtype="float64")
    prompts = [await engine.embed([Message("user", "word " * count)]) for count in (1300, 9)]
    prompts.append(await engine.embed([Message("system", "word " * 1300), Message("user", "Hi")]))
    forward, calls = engine._loaded.forward, []

    def scarce(rows: Any, packed: Any) -> Any:
        calls.append(rows.shape[1])
        if len(calls) > 1000:
            raise RuntimeError("no end in sight")
        if rows.shape[1] > 40:
            raise MemoryError
        return forward(rows, packed)

    monkeypatch.setattr(engine._loaded, "forward", scarce)
    done = await engine.generate_batch([request(prompt, 5) for prompt in prompts])
    await engine.aclose()
    assert [completion.token_ids for completion in done] == await alone(tiny_folder, prompts, 5)


async def test_a_sequence_that_overflows_spoils_no_later_one_in_its_place(tiny_folder: Path) -> None:
    engine = TransformersEngine(str(tiny_folder), dtype="float16", max_batch=2)
    prompt = await engine.embed([Message("user", "Hi")])
    long = await engine.embed([Message("user", "waves " * 60)])
    beyond = long.moved(np.full_like(long.matrix, 1e6))  # more than a float16 holds
    [expected] = await engine.generate_batch([request(prompt, 12)])
    stream = engine.stream(request(long, 400))
    await anext(stream)
    with pytest.raises(EngineError, match="not finite"):
        await engine.generate_batch([request(beyond, 5)])
    [found] = await engine.generate_batch([request(prompt, 12)])
    await stream.aclose()
    await engine.aclose()
    assert found.finish_reason == expected.finish_reason == "length"
