"""Cancelling, failing, closing, and being used from several places at once."""

from __future__ import annotations

import asyncio
import pickle
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
import torch

from tta_middleware.engines.decoding.capacity import default_batch
from tta_middleware.engines.decoding.handoff import Mailbox, StreamGroup
from tta_middleware.engines.decoding.row import Row
from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.errors import ConfigurationError, EmbeddingShapeError, EngineError
from tta_middleware.types import GenerationRequest, Message, PromptEmbeddings, Sampling, TextDelta

ENDLESS = 4000


async def prompt_of(engine: TransformersEngine, text: str = "Tell me something.") -> PromptEmbeddings:
    return await engine.embed([Message("user", text)])


def request(prompt: PromptEmbeddings, tokens: int = ENDLESS) -> GenerationRequest:
    return GenerationRequest(prompt, Sampling(max_new_tokens=tokens))


def decode_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "tta-decode"}


async def test_abort_stops_a_stream_within_one_step(tiny: TransformersEngine) -> None:
    endless = request(await prompt_of(tiny))
    stream = tiny.stream(endless)
    await anext(stream)
    endless.abort.set()
    steps = tiny.stats().steps
    last = [delta async for delta in stream][-1]
    assert last.finish_reason == "aborted"
    assert tiny.stats().steps <= steps + 1
    assert tiny.stats().active == 0


async def test_whoever_has_an_answer_finds_its_steps_counted(
    tiny: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = await prompt_of(tiny)
    looked = threading.Event()
    decoder: Any = tiny._decoder
    run, passes = decoder._batch.turn, []
    monkeypatch.setattr(decoder._batch, "turn", lambda: passes.append(run()) or passes[-1])
    # What the decode thread does after the pass with the token waits until the caller has looked.
    monkeypatch.setattr(decoder._tuner, "record_pass", lambda *_: passes[-1] and looked.wait(30))
    try:
        await tiny.generate_batch([request(prompt, 1)])
        after = tiny.stats()
    finally:
        looked.set()
    assert (after.steps, after.tokens) == (len(passes), 1)


async def test_abort_leaves_the_rest_of_the_batch_running(tiny: TransformersEngine) -> None:
    prompt = await prompt_of(tiny)
    dropped = request(prompt)
    async with anyio.create_task_group() as tasks:

        async def abort_once_it_runs() -> None:
            async for _ in tiny.stream(request(prompt, 2)):
                pass
            dropped.abort.set()

        tasks.start_soon(abort_once_it_runs)
        aborted, finished = await tiny.generate_batch([dropped, request(prompt, 60)])
    assert aborted.finish_reason == "aborted"
    assert 0 < len(aborted.token_ids) < ENDLESS
    assert len(finished.token_ids) == 60


async def test_closing_a_stream_frees_its_row_within_one_step(tiny: TransformersEngine) -> None:
    prompt = await prompt_of(tiny)
    stream = tiny.stream(request(prompt))
    await anext(stream)
    await stream.aclose()
    before = tiny.stats().tokens
    await tiny.generate_batch([request(prompt, 5)])
    assert tiny.stats().tokens <= before + 1 + 5
    assert tiny.stats().active == 0


async def test_a_stream_may_be_closed_by_another_task(tiny: TransformersEngine) -> None:
    stream = tiny.stream(request(await prompt_of(tiny)))
    await anext(stream)
    await asyncio.create_task(stream.aclose())
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_cancelling_a_batch_frees_its_rows(tiny: TransformersEngine) -> None:
    prompt = await prompt_of(tiny)
    task = asyncio.create_task(tiny.generate_batch([request(prompt), request(prompt)]))
    await tiny.generate_batch([request(prompt, 3)])
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    before = tiny.stats().tokens
    await tiny.generate_batch([request(prompt, 5)])
    assert tiny.stats().tokens <= before + 2 + 5


async def test_queued_requests_can_be_aborted(tiny_folder: Path) -> None:
    engine = TransformersEngine(str(tiny_folder), max_batch=1)
    prompt = await prompt_of(engine)
    first, second = request(prompt), request(prompt)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(engine.generate_batch, [first])
        waiting = engine.stream(second)
        second.abort.set()
        deltas = [delta async for delta in waiting]
        first.abort.set()
    assert [(delta.text, delta.finish_reason) for delta in deltas] == [("", "aborted")]
    await engine.aclose()


async def test_more_requests_than_places_are_all_answered_in_order(tiny_folder: Path) -> None:
    engine = TransformersEngine(str(tiny_folder), max_batch=3, dtype="float64")
    prompt = await prompt_of(engine)
    lengths = [14, 19, 12, 17, 11, 15, 13]
    completions = await engine.generate_batch([request(prompt, length) for length in lengths])
    assert [len(completion.token_ids) for completion in completions] == lengths
    assert engine.stats().tokens <= 3 * engine.stats().steps
    longest = max((completion.token_ids for completion in completions), key=len)
    assert all(c.token_ids == longest[: len(c.token_ids)] for c in completions)
    await engine.aclose()


@pytest.mark.parametrize("failure", [RuntimeError, SystemExit])
async def test_a_failing_step_reaches_its_callers_and_the_engine_lives_on(
    tiny: TransformersEngine, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException]
) -> None:
    prompt = await prompt_of(tiny)
    await tiny.generate_batch([request(prompt, 1)])
    forward, calls = tiny._loaded.forward, iter(range(1000))

    def fail_on_the_third(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 2:
            raise failure("out of memory, as it were")
        return forward(*args, **kwargs)

    monkeypatch.setattr(tiny._loaded, "forward", fail_on_the_third)
    with pytest.raises(EngineError, match="out of memory") as caught, anyio.fail_after(20):
        await tiny.generate_batch([request(prompt), request(prompt)])
    assert isinstance(caught.value.__cause__, failure)
    [completion] = await tiny.generate_batch([request(prompt, 4)])
    assert len(completion.token_ids) == 4


async def test_work_beside_the_passes_that_ends_its_thread_does_not(tiny: TransformersEngine) -> None:
    prompt = await prompt_of(tiny)
    with pytest.raises(EngineError, match="SystemExit"), anyio.fail_after(20):
        await tiny._beside_decoding(sys.exit)
    [completion] = await tiny.generate_batch([request(prompt, 2)])
    assert len(completion.token_ids) == 2


async def test_who_comes_while_what_has_ended_cannot_be_cleared_away_hears_of_it(
    tiny: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = await prompt_of(tiny)
    await tiny.generate_batch([request(prompt, 1)])

    def fail() -> None:
        monkeypatch.undo()
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(tiny._decoder._batch, "drop_cancelled", fail)
    with pytest.raises(EngineError, match="lost"), anyio.fail_after(20):
        await tiny.generate_batch([request(prompt, 2)])
    assert len((await tiny.generate_batch([request(prompt, 2)]))[0].token_ids) == 2


async def test_a_device_on_which_nothing_works_any_more_leaves_nobody_waiting(
    tiny: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After some errors of CUDA not even a copy works, and clearing away would make some."""
    short, long = await prompt_of(tiny), await prompt_of(tiny, "Tell me something. " * 200)
    first, *others = (tiny.stream(request(prompt)) for prompt in (short, long, long))
    for stream in (first, *others):
        await anext(stream)
    await first.aclose()  # what has its slot now is the last of the others, so these stand in no order
    for stream in others:
        await anext(stream)

    def lost(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the device is lost")

    with monkeypatch.context() as patched:
        patched.setattr(tiny._loaded, "forward", lost)
        patched.setattr("tta_middleware.engines.decoding.kv_slots._Group.put", lost)
        for stream in others:
            with pytest.raises(EngineError, match="lost"), anyio.fail_after(20):
                async for _ in stream:
                    pass
        with pytest.raises(EngineError, match="lost"), anyio.fail_after(20):
            await tiny.generate_batch([request(short, 2)])
    assert len((await tiny.generate_batch([request(short, 2)]))[0].token_ids) == 2


@pytest.mark.parametrize("who", [0, 1], ids=["who begins", "who waits"])
async def test_a_stream_that_is_closed_while_its_group_begins_is_not_decoded(
    tiny: TransformersEngine, who: int
) -> None:
    loaded, rows = anyio.Event(), list[Row]()

    async def begin(requests: Sequence[GenerationRequest]) -> list[tuple[Row, Mailbox[TextDelta]]]:
        await loaded.wait()
        begun = await tiny._begin(requests)
        rows.extend(row for row, _ in begun)
        return begun

    group = StreamGroup(begin, [request(await prompt_of(tiny))] * 2)
    tasks = [asyncio.create_task(anext(group.stream(index))) for index in range(2)]
    await anyio.wait_all_tasks_blocked()
    tasks[who].cancel()
    await asyncio.wait([tasks[who]])
    loaded.set()
    await tasks[1 - who]
    assert rows[who].cancelled
    rows[1 - who].cancel()


async def test_a_failing_prompt_spares_the_rows_that_run(tiny: TransformersEngine, monkeypatch: Any) -> None:
    prompt = await prompt_of(tiny)
    endless = request(prompt)
    stream = tiny.stream(endless)
    await anext(stream)
    forward = tiny._loaded.forward

    def fail_on_prompts(rows: Any, packed: Any) -> Any:
        if len(rows[0]) > 4:
            raise RuntimeError("no such kernel")
        return forward(rows, packed)

    monkeypatch.setattr(tiny._loaded, "forward", fail_on_prompts)
    with pytest.raises(EngineError, match="no such kernel"):
        await tiny.generate_batch([request(prompt, 3)])
    with pytest.raises(EngineError, match="no such kernel"):
        await tiny.mean_nll(prompt, [[5, 6, 7, 8, 9]])
    assert (await anext(stream)).finish_reason is None
    endless.abort.set()
    assert [delta async for delta in stream][-1].finish_reason == "aborted"


FOREIGN = 10**7


def of_tokens(prompt: PromptEmbeddings, token_id: int) -> PromptEmbeddings:
    return replace(prompt, token_ids=np.full_like(prompt.token_ids, token_id))


@pytest.mark.parametrize(
    "ask",
    [
        lambda engine, prompt: engine.mean_nll(prompt, [[FOREIGN, 5]]),
        lambda engine, prompt: engine.mean_nll(prompt, [[5, -1]]),
        lambda engine, prompt: engine.mean_nll(of_tokens(prompt, -1), [[5, 6]]),
        lambda engine, prompt: engine.next_token_logprobs([prompt], [FOREIGN]),
        lambda engine, prompt: engine.generate_batch([request(of_tokens(prompt, FOREIGN), 3)]),
    ],
    ids=["text", "last token", "scored prompt", "asked", "prompt"],
)
async def test_tokens_of_another_model_are_refused_and_harm_nobody_else(tiny: TransformersEngine, ask: Any) -> None:
    prompt = await prompt_of(tiny)
    endless = request(prompt)
    stream = tiny.stream(endless)
    await anext(stream)
    with pytest.raises(EmbeddingShapeError, match="another model"):
        await ask(tiny, prompt)
    assert (await anext(stream)).finish_reason is None
    endless.abort.set()
    assert [delta async for delta in stream][-1].finish_reason == "aborted"


async def test_overflowing_embeddings_are_an_error_not_an_answer(tiny: TransformersEngine) -> None:
    prompt = await prompt_of(tiny)
    with pytest.raises(EmbeddingShapeError, match="not finite"):
        await tiny.generate_batch([request(prompt.moved(np.full_like(prompt.matrix, np.nan)))])


async def test_one_engine_serves_two_event_loops_at_once(tiny_folder: Path) -> None:
    engine = TransformersEngine(str(tiny_folder), dtype="float64")
    answers: dict[int, str] = {}
    barrier = threading.Barrier(2)

    async def answer(index: int) -> None:
        prompt = await prompt_of(engine)
        barrier.wait()
        text = [delta.text async for delta in engine.stream(request(prompt, 60))]
        [completion] = await engine.generate_batch([request(prompt, 60)])
        assert "".join(text) == completion.text
        answers[index] = completion.text

    threads = [threading.Thread(target=asyncio.run, args=(answer(index),)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        await anyio.to_thread.run_sync(thread.join)
    assert answers[0] == answers[1] != ""
    await engine.aclose()


async def test_a_loop_that_closes_under_its_stream_frees_the_row(tiny: TransformersEngine) -> None:
    prompt = await prompt_of(tiny)

    def leave_a_stream_behind() -> None:
        loop = asyncio.new_event_loop()
        loop.run_until_complete(anext(tiny.stream(request(prompt))))
        loop.close()

    await anyio.to_thread.run_sync(leave_a_stream_behind)
    await tiny.generate_batch([request(prompt, 5)])
    assert tiny.stats().active == 0


async def test_closing_the_engine_ends_its_thread_and_its_callers(tiny_folder: Path) -> None:
    before = decode_threads()
    engine = TransformersEngine(str(tiny_folder))
    prompt = await prompt_of(engine)
    stream = engine.stream(request(prompt))
    await anext(stream)
    assert len(decode_threads() - before) == 1
    await engine.aclose()
    assert decode_threads() <= before
    with pytest.raises(EngineError, match="closed"):
        async for _ in stream:
            pass
    with pytest.raises(EngineError, match="closed"):
        await engine.generate_batch([request(prompt)])
    await engine.aclose()


async def test_an_idle_thread_ends_and_the_next_request_starts_another(tiny: TransformersEngine) -> None:
    prompt = await prompt_of(tiny)
    before = decode_threads()
    tiny._decoder._grace_seconds = 0.0
    for _ in range(2):
        await tiny.generate_batch([request(prompt, 2)])
        for thread in decode_threads() - before:
            await anyio.to_thread.run_sync(thread.join)
    assert decode_threads() <= before


async def test_many_first_uses_load_one_model(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tta_middleware.engines.decoding.loading as loaded

    loads: list[Path] = []
    real = loaded.load_model

    def counted(folder: Path, how: Any) -> Any:
        loads.append(folder)
        return real(folder, how)

    monkeypatch.setattr(loaded, "load_model", counted)
    engine = TransformersEngine(str(tiny_folder))
    assert loads == []
    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(engine.load)
    assert len(loads) == 1
    await engine.aclose()


def test_nonsense_settings_are_refused(tiny_folder: Path) -> None:
    for wrong in (0, "8", True, 2.5):
        with pytest.raises(ConfigurationError, match="max_batch is a whole number from 1 on"):
            TransformersEngine(max_batch=wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="cache_gib is a number, not '4'"):
        TransformersEngine(cache_gib="4")  # type: ignore[arg-type]
    for options, told in (
        ({"dtype": "int8"}, "dtype"),
        ({"device": "abacus"}, "device"),
        ({"device": "cuda:7"}, "no device 'cuda:7'"),
    ):
        with pytest.raises(ConfigurationError, match=told):
            asyncio.run(TransformersEngine(str(tiny_folder), **options).load())


async def test_a_model_on_a_device_does_not_outlive_a_fork(tiny_folder: Path) -> None:
    import torch

    engine = TransformersEngine(str(tiny_folder))
    await engine.load()
    engine._loaded.device = torch.device("cuda")
    engine.after_fork()
    with pytest.raises(EngineError, match=r"model on cuda does not outlive a fork; load it after the fork.*'spawn'"):
        await prompt_of(engine)
    await engine.aclose()


async def test_how_many_places_there_are_is_the_devices_to_say_unless_somebody_asks(tiny_folder: Path) -> None:
    engine = TransformersEngine(str(tiny_folder), device="cpu")
    assert engine.max_batch is None
    await engine.load()
    assert engine.max_batch == 32
    assert default_batch(torch.device("cuda")) > 32
    copy = pickle.loads(pickle.dumps(engine))
    assert copy.max_batch is None, "a copy may load on another device"
    await engine.aclose()
