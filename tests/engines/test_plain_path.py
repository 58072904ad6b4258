"""The plain path: a model that runs by its own cache keeps the engine's contract."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.errors import ConfigurationError, EngineError
from tta_middleware.testing.engine import EngineContract
from tta_middleware.types import Completion, GenerationRequest, Message, PromptEmbeddings, Sampling

SYSTEM = Message("system", "Answer in one sentence, kindly, and without any doubt that would not help the reader.")
ENDLESS = 2000


@pytest.mark.slow
class TestContract(EngineContract):
    @pytest.fixture
    def engine(self, hybrid_folder: Path) -> Iterator[TransformersEngine]:
        engine = TransformersEngine(str(hybrid_folder), dtype="float32")
        yield engine
        asyncio.run(engine.aclose())


def request(prompt: PromptEmbeddings, tokens: int, **sampling: Any) -> GenerationRequest:
    return GenerationRequest(prompt, Sampling(max_new_tokens=tokens, **sampling))


async def embedded(engine: TransformersEngine, counts: tuple[int, ...]) -> list[PromptEmbeddings]:
    return [await engine.embed([SYSTEM, Message("user", "word " * count)]) for count in counts]


async def alone(folder: Path, prompts: list[PromptEmbeddings], tokens: int) -> list[tuple[int, ...]]:
    """One after the other, on an engine of its own."""
    engine = TransformersEngine(str(folder), dtype="float64", max_batch=1)
    done = await engine.generate_batch([request(prompt, tokens) for prompt in prompts])
    await engine.aclose()
    return [completion.token_ids for completion in done]


def count_passes(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(sequences, columns) of every pass from now on."""
    run, passes = engine._loaded.run, []

    def counted(columns: Any, *rest: Any, **named: Any) -> Any:
        passes.append(tuple(columns.shape[:2]))
        return run(columns, *rest, **named)

    monkeypatch.setattr(engine._loaded, "run", counted)
    return passes


async def test_sequences_of_any_length_decode_side_by_side(
    hybrid: TransformersEngine, hybrid_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = await embedded(hybrid, (1, 30, 9, 3))
    passes = count_passes(hybrid, monkeypatch)
    done = await hybrid.generate_batch([request(prompt, 12) for prompt in prompts])
    assert [completion.token_ids for completion in done] == await alone(hybrid_folder, prompts, 12)
    assert (4, 1) in passes


async def test_candidates_of_one_length_run_their_prompts_together_behind_a_shared_beginning(
    hybrid: TransformersEngine, hybrid_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [prompt] = await embedded(hybrid, (9,))
    head = int(prompt.user_mask.argmax())
    rows = np.random.default_rng(0).standard_normal((3, *prompt.matrix.shape)).astype(np.float32)
    rows[:, :head] = 0.0
    prompts = [prompt.moved(prompt.matrix + noise) for noise in rows]
    passes = count_passes(hybrid, monkeypatch)
    done = await hybrid.generate_batch([request(prompt, 6) for prompt in prompts])
    assert passes[:2] == [(1, head), (3, len(prompt.matrix) - head)]
    assert [completion.token_ids for completion in done] == await alone(hybrid_folder, prompts, 6)
    assert len({completion.token_ids for completion in done}) == 3


async def test_a_closed_stream_stops_within_one_pass(hybrid: TransformersEngine, monkeypatch: Any) -> None:
    [prompt] = await embedded(hybrid, (2,))
    passes = count_passes(hybrid, monkeypatch)
    stream = hybrid.stream(request(prompt, ENDLESS))
    await anext(stream)
    await stream.aclose()
    before = len(passes)
    [short] = await hybrid.generate_batch([request(prompt, 3)])
    assert len(short.token_ids) == 3
    # One pass may have been running; then the beginning is there already, a prompt and two steps.
    assert len(passes) - before <= 1 + 3
    assert hybrid.stats().active == 0


@pytest.mark.parametrize("fails_at", [3, *(pytest.param(at, marks=pytest.mark.slow) for at in (1, 2, 5, 8, 11))])
async def test_for_want_of_memory_sequences_begin_again_and_end_alike(
    hybrid: TransformersEngine, hybrid_folder: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    prompts = await embedded(hybrid, (1, 9, 3, 20))
    run, calls = hybrid._loaded.run, []

    def scarce(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == fails_at:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 99 bytes")
        return run(*arguments, **named)

    monkeypatch.setattr(hybrid._loaded, "run", scarce)
    done = await hybrid.generate_batch([request(prompt, 9) for prompt in prompts])
    assert len(calls) > fails_at
    assert [completion.token_ids for completion in done] == await alone(hybrid_folder, prompts, 9)
    assert hybrid.stats().set_aside > 0


async def test_memory_that_never_suffices_is_an_error_that_says_so(
    hybrid: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    [prompt] = await embedded(hybrid, (1,))

    def none_left(*_: Any, **_named: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(hybrid._loaded, "run", none_left)
    with pytest.raises(EngineError, match="out of memory with a single sequence"):
        await hybrid.generate_batch([request(prompt, 3)])


async def test_a_failing_prompt_spares_the_others(hybrid: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    fine, bad = await embedded(hybrid, (4, 4))
    bad = bad.moved(bad.matrix + bad.user_mask[:, None] * 0.5)
    run, mark = hybrid._loaded.run, hybrid._loaded.columns(bad)[-6:]

    def picky(columns: Any, *rest: Any, **named: Any) -> Any:
        if columns.shape[1] > 1 and any((one[-6:] == mark).all() and (one - two).any() for one, two in pairs(columns)):
            raise ValueError("not this one")
        return run(columns, *rest, **named)

    reference = hybrid._loaded.columns(fine)

    def pairs(columns: Any) -> list[tuple[Any, Any]]:
        return [(one, reference[-len(one) :]) for one in columns]

    monkeypatch.setattr(hybrid._loaded, "run", picky)
    done: list[Completion] = []

    async def go_on() -> None:
        done.extend(await hybrid.generate_batch([request(fine, 8)]))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(go_on)
        with pytest.raises(EngineError, match="not this one"):
            await hybrid.generate_batch([request(bad, 8)])
    assert len(done[0].token_ids) == 8


async def test_likelihoods_and_states_are_those_of_the_whole_pass(hybrid: TransformersEngine) -> None:
    import torch

    prompts = await embedded(hybrid, (3, 12))
    scores = await hybrid.mean_nll(prompts[0], [[5, 6, 7], [8]])
    asked = await hybrid.next_token_logprobs(prompts, [11, 12])
    states = await hybrid.hidden_states(prompts)
    early = await hybrid.hidden_states(prompts, [1])
    with pytest.raises(ConfigurationError, match="by its own cache"):
        await hybrid.hidden_states(prompts, [1], spans=[[(0, 2)]] * 2)
    model = hybrid._loaded
    for prompt, logs, state, first in zip(prompts, asked, states, early, strict=True):
        whole = model.whole(model.columns(prompt))[-1]
        own = model.model(**model._inputs(model.columns(prompt)[None]), output_hidden_states=True).hidden_states[1]
        assert torch.allclose(torch.from_numpy(first).to(own), own[0, -1], rtol=1e-3, atol=1e-4)
        assert logs == pytest.approx(whole.log_softmax(-1)[[11, 12]].tolist())
        own = model.model.get_output_embeddings()(torch.from_numpy(state)[None].to(whole))[0]
        assert torch.allclose(own, whole, rtol=1e-3, atol=1e-4)
    for ids, score in zip(([5, 6, 7], [8]), scores, strict=True):
        columns = torch.cat([model.columns(prompts[0]), model.token_columns(ids)])
        logits = model.whole(columns)[len(prompts[0].matrix) - 1 : -1]
        assert score == pytest.approx(float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids))))


async def test_a_long_prompt_runs_in_parts_between_the_steps_of_others(
    hybrid: TransformersEngine, hybrid_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tta_middleware.engines.decoding.plain_batch as batch

    monkeypatch.setattr(batch, "_PASS_TOKENS", 32)
    engine = TransformersEngine(str(hybrid_folder), dtype="float64")
    prompts = await embedded(engine, (2, 90))
    passes = count_passes(engine, monkeypatch)
    done = await engine.generate_batch([request(prompt, 9) for prompt in prompts])
    await engine.aclose()
    monkeypatch.undo()
    assert max(columns for _, columns in passes[1:]) <= 32
    assert [completion.token_ids for completion in done] == await alone(hybrid_folder, prompts, 9)


async def test_output_that_is_not_finite_is_an_error_not_an_answer(
    hybrid: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, other = await embedded(hybrid, (2, 5))
    run = hybrid._loaded.run

    def overflowing(columns: Any, *rest: Any, **named: Any) -> Any:
        logits, cache, states = run(columns, *rest, **named)
        return logits * float("nan"), cache, states

    with monkeypatch.context() as patched:
        patched.setattr(hybrid._loaded, "run", overflowing)
        with pytest.raises(EngineError, match="not finite"):
            await hybrid.generate_batch([request(prompt, 4)])
    [fine] = await hybrid.generate_batch([request(other, 4)])
    assert len(fine.token_ids) == 4


@pytest.mark.slow
async def test_a_model_without_a_cache_that_goes_on_runs_whole_every_time(
    hybrid_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tta_middleware.engines.decoding.plain_model as plain

    monkeypatch.setattr(plain._Trial, "steps", lambda _: False)
    engine = TransformersEngine(str(hybrid_folder), dtype="float64")
    assert "every token runs the whole sequence" in (await engine.way())[1]
    prompts = await embedded(engine, (2, 7))
    done = await engine.generate_batch([request(prompt, 7) for prompt in prompts])
    await engine.aclose()
    monkeypatch.undo()
    assert [completion.token_ids for completion in done] == await alone(hybrid_folder, prompts, 7)
