"""llama.cpp against the engine contract, against our own engine, and under a guard."""

from __future__ import annotations

import asyncio
import importlib.metadata
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from tta_llama_cpp import LlamaCppEngine
from tta_llama_cpp.batch import Batch

from tta_middleware import Guard, Message, Noise, Policy, Repair, Sampling
from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.errors import ConfigurationError, ContextLengthError, EngineError, MissingExtraError
from tta_middleware.moderation.embedded import EmbeddedModerator
from tta_middleware.registry import resolve_moderator
from tta_middleware.testing.engine import EngineContract
from tta_middleware.types import Completion, FloatMatrix, GenerationRequest, PromptEmbeddings

PATIENCE = 60.0
THRESHOLD = 0.04


async def asked(engine: LlamaCppEngine, text: str, *, tokens: int) -> GenerationRequest:
    return GenerationRequest(await engine.embed([Message("user", text)]), Sampling(max_new_tokens=tokens))


@pytest.mark.slow
class TestLlamaCpp(EngineContract):
    @pytest.fixture
    async def engine(self, llama: LlamaCppEngine) -> LlamaCppEngine:
        return llama


@pytest.mark.slow
async def test_more_requests_than_places_are_all_answered_in_order(llama: LlamaCppEngine) -> None:
    requests = [await asked(llama, f"Count to {number}.", tokens=2 + number % 3) for number in range(8)]
    found = await llama.generate_batch(requests)
    assert [len(completion.token_ids) for completion in found] == [2 + number % 3 for number in range(8)]
    assert llama.free_places() == llama.max_batch


async def test_a_closed_stream_gives_its_place_to_who_waits(llama: LlamaCppEngine) -> None:
    held = [llama.stream(await asked(llama, "Count to one thousand.", tokens=400)) for _ in range(llama.max_batch)]
    for stream in held:
        await anext(stream)
    assert llama.free_places() == 0
    found: list[Completion] = []

    async def wait() -> None:
        found.extend(await llama.generate_batch([await asked(llama, "Say hello.", tokens=2)]))

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await held[0].aclose()
    assert len(found[0].token_ids) == 2
    for stream in held[1:]:
        await stream.aclose()


async def test_who_waits_for_a_place_can_be_aborted(llama: LlamaCppEngine) -> None:
    held = [llama.stream(await asked(llama, "Count to one thousand.", tokens=400)) for _ in range(llama.max_batch)]
    for stream in held:
        await anext(stream)
    waiting = await asked(llama, "Say hello.", tokens=2)
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(llama.generate_batch, [waiting])
            await anext(held[0])
            waiting.abort.set()
    for stream in held:
        await stream.aclose()


class Counting:
    """A model that counts its passes and has a request aborted in the first of them."""

    width, context, passes = 4, 4096, 0

    def __init__(self, request: GenerationRequest) -> None:
        self._request = request

    def decode_rows(self, _: Any, columns: Sequence[Any]) -> FloatMatrix:
        self.passes += 1
        self._request.abort.set()
        return np.zeros((sum(column.asked for column in columns), 10), dtype=np.float32)

    def forget(self, _: int) -> None:
        """Nothing is kept."""


async def test_a_prompt_that_is_aborted_runs_no_further() -> None:
    rows = 1000  # some passes' worth
    prompt = PromptEmbeddings(
        np.zeros((rows, 4), dtype=np.float32), np.zeros(rows, dtype=np.int64), np.zeros(rows, dtype=np.bool_)
    )
    request = GenerationRequest(prompt, Sampling(max_new_tokens=5))
    model: Any = Counting(request)
    batch = Batch(model, 1, frozenset())
    passes = asyncio.create_task(batch.run())
    assert [step async for step in batch.steps(request)] == [([], "aborted")]
    assert (model.passes, batch.free) == (1, 1)
    passes.cancel()


@pytest.mark.slow
async def test_an_answer_ends_where_its_sequence_is_full(llama: LlamaCppEngine) -> None:
    bare = await asked(llama, "word " * 430, tokens=400)
    [found] = await llama.generate_batch([bare])
    assert found.finish_reason in ("length", "stop")
    assert len(found.token_ids) <= 512 - len(bare.prompt.matrix)
    with pytest.raises(ConfigurationError, match="context"):
        await llama.embed([Message("user", "word " * 600)])
    long = PromptEmbeddings(*(np.repeat(part, 20, axis=0) for part in _parts(bare.prompt)))
    with pytest.raises(ContextLengthError, match="context is 512; shorten"):
        await llama.generate_batch([GenerationRequest(long, bare.sampling)])


def _parts(prompt: PromptEmbeddings) -> tuple[np.ndarray, ...]:
    return prompt.matrix, prompt.token_ids, prompt.user_mask


@pytest.mark.slow
async def test_long_prompts_and_scores_in_parts_are_those_of_our_own_engine(
    llama: LlamaCppEngine, smollm2: TransformersEngine
) -> None:
    """Weights of 4 bits, whose activations llama.cpp rounds to 8, against the same weights as numbers."""
    text = "The harbour lies behind the old wall. " * 40 + "Where does the harbour lie?"
    ours, theirs = [await engine.embed([Message("user", text)]) for engine in (smollm2, llama)]
    assert ours.token_ids.tolist() == theirs.token_ids.tolist()
    assert np.abs(ours.matrix - theirs.matrix).max() < 1e-2
    [answer] = await llama.generate_batch([GenerationRequest(theirs, Sampling(max_new_tokens=40))])
    again = answer.token_ids + answer.token_ids
    scores = [
        await engine.mean_nll(prompt, [answer.token_ids, again])
        for engine, prompt in ((smollm2, ours), (llama, theirs))
    ]
    assert scores[0] == pytest.approx(scores[1], abs=0.15)
    assert scores[1][0] < 1.5


@pytest.mark.slow
async def test_what_follows_is_the_same_whatever_ran_before(llama: LlamaCppEngine) -> None:
    """The beginning that two prompts share runs once, and a score in between leaves nothing behind."""
    first, second, other = [
        await llama.embed([Message("user", text)]) for text in ("Is a cat an animal?", "Is a cat a plant?", "Hello")
    ]
    alone = [(await llama.next_token_logprobs([prompt], [11, 12]))[0] for prompt in (first, other, second)]
    await llama.mean_nll(first, [[11, 12, 13]])
    together = await llama.next_token_logprobs([first, second, first, other], [11, 12])
    assert together[0] == pytest.approx(together[2], abs=0.05)
    assert [together[0], together[3], together[1]] == [pytest.approx(likely, abs=0.05) for likely in alone]
    assert await llama.next_token_logprobs([], [11]) == []


@pytest.mark.slow
async def test_the_model_judges_its_own_answers(llama: LlamaCppEngine) -> None:
    moderator = resolve_moderator("self", engine=llama)
    first, again = [await moderator.moderate(["Rome is a city."], prompt="Name a city.") for _ in range(2)]
    assert 0.0 < first[0].score < 1.0
    assert first[0].score == pytest.approx(again[0].score, abs=0.02)


@pytest.mark.slow
async def test_a_guard_repairs_through_prompt_embeddings(llama: LlamaCppEngine) -> None:
    guard = Guard(llama, EmbeddedModerator(), policy=Policy(threshold=THRESHOLD), repair=Repair(method=Noise()))
    prompts = ("Tell me about knives.", "What should I do when I am angry at my neighbour?", "Write a rude limerick.")
    answers = [await guard.answer([Message("user", text)], Sampling(max_new_tokens=24)) for text in prompts]
    repaired = [answer.trace for answer in answers if answer.trace.outcome == "neutralised"]
    assert repaired
    for trace in repaired:
        assert trace.final is not None
        assert trace.final.score < THRESHOLD
        assert trace.relative_move > 0


async def test_readers_of_an_engine_that_is_closed_hear_of_it() -> None:
    engine = LlamaCppEngine("smollm2", max_batch=1, context=64, threads=1)
    stream = engine.stream(await asked(engine, "Count.", tokens=400))
    async with aclosing(stream):
        await anext(stream)
        await engine.aclose()
        with pytest.raises(EngineError, match="closed"):
            async for _ in stream:
                pass
    with pytest.raises(EngineError, match="closed"):
        await engine.embed([Message("user", "Hello")])


def test_settings_that_mean_nothing_here_are_refused() -> None:
    for options in ({"device": "cuda"}, {"dtype": "bfloat16"}, {"max_batch": 0}, {"threads": -1}):
        with pytest.raises(ConfigurationError):
            LlamaCppEngine("smollm2", **options)  # type: ignore[arg-type]


async def test_a_folder_is_no_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="no GGUF file"):
        await LlamaCppEngine(str(tmp_path)).load()


async def test_another_release_of_the_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from tta_llama_cpp import library

    library.library.cache_clear()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2020.1.1")
    with pytest.raises(ConfigurationError, match="pip install xllamacpp=="):
        await LlamaCppEngine("smollm2").load()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"tta-middleware\[llama-cpp\]"):
        await LlamaCppEngine("smollm2").load()
