"""What the embedded model decodes, held against transformers' own generate."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.errors import ConfigurationError
from tta_middleware.types import Completion, GenerationRequest, Message, PromptEmbeddings, Sampling

PROMPTS = (
    "Hi",
    "What is the capital of France?",
    "Write two lines about rain on a tin roof, and end with an emoji 🌧️.",
    "List the numbers from one to twelve in words, separated by commas.",
)


@contextmanager
def plain(engine: TransformersEngine) -> Iterator[Any]:
    """The engine's model with transformers' own attention."""
    model: Any = engine._loaded.model
    ours = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    yield model
    model.set_attn_implementation(ours)


def reference(engine: TransformersEngine, prompt: PromptEmbeddings, tokens: int) -> list[int]:
    """Greedy ids of model.generate from input_ids."""
    import torch

    ids = torch.tensor(prompt.token_ids, device=engine._loaded.device)[None]
    with torch.inference_mode(), plain(engine) as model:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return list(out[0, ids.shape[1] :].tolist())


def request(prompt: PromptEmbeddings, tokens: int, **sampling: Any) -> GenerationRequest:
    return GenerationRequest(prompt, Sampling(max_new_tokens=tokens, **sampling))


async def embed_all(engine: TransformersEngine, texts: tuple[str, ...] = PROMPTS) -> list[PromptEmbeddings]:
    return [await engine.embed([Message("user", text)]) for text in texts]


@pytest.mark.slow
async def test_greedy_from_embeddings_equals_generate_from_ids(smollm2: TransformersEngine) -> None:
    prompts = await embed_all(smollm2)
    expected = [reference(smollm2, prompt, 12) for prompt in prompts]
    batched = await smollm2.generate_batch([request(prompt, 12) for prompt in prompts])
    assert [list(completion.token_ids) for completion in batched] == expected
    [single] = await smollm2.generate_batch([request(prompts[2], 12)])
    assert list(single.token_ids) == expected[2]


QUESTIONS = ("What is {}?", "Tell me two facts about {}.", "Write a line of verse about {}.", "Why do people like {}?")
THINGS = ("rain", "an oak tree", "the number seven", "a bicycle", "\u00e9t\u00e9 in Provence")
TWENTY = tuple(question.format(thing) for question in QUESTIONS for thing in THINGS)


@pytest.mark.slow
async def test_greedy_from_embeddings_equals_generate_on_twenty_prompts(smollm2: TransformersEngine) -> None:
    prompts = await embed_all(smollm2, TWENTY)
    expected = [reference(smollm2, prompt, 32) for prompt in prompts]
    batched = await smollm2.generate_batch([request(prompt, 32) for prompt in prompts])
    assert [list(completion.token_ids) for completion in batched] == expected
    for prompt, ids in zip(prompts, expected, strict=True):
        [single] = await smollm2.generate_batch([request(prompt, 32)])
        assert list(single.token_ids) == ids


@pytest.mark.slow
async def test_a_stream_is_the_same_while_batches_join_and_leave(smollm2: TransformersEngine) -> None:
    prompts = await embed_all(smollm2)
    alone = await smollm2.generate_batch([request(prompts[3], 24)])
    joined: list[list[Completion]] = []

    async def join(count: int) -> None:
        joined.append(await smollm2.generate_batch([request(prompt, 6) for prompt in prompts[:count]]))

    text = ""
    async with anyio.create_task_group() as tasks:
        async for delta in smollm2.stream(request(prompts[3], 24)):
            if text == "":
                tasks.start_soon(join, 3)
                tasks.start_soon(join, 2)
            text += delta.text
    assert text == alone[0].text
    expected = [reference(smollm2, prompt, 6) for prompt in prompts[:3]]
    for completions in joined:
        for completion, ids in zip(completions, expected, strict=False):
            assert list(completion.token_ids) == ids


async def test_the_context_bounds_an_answer(save_model: Any, tiny_sizes: dict[str, Any]) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(**{**tiny_sizes, "max_position_embeddings": 48})
    engine = TransformersEngine(str(save_model(config)), dtype="float32")
    prompt = (await embed_all(engine, ("Hi",)))[0]
    [completion] = await engine.generate_batch([request(prompt, 400)])
    assert completion.finish_reason == "length"
    assert len(prompt.token_ids) + len(completion.token_ids) == 48
    with pytest.raises(ConfigurationError, match="context is 48"):
        await engine.embed([Message("user", "word " * 60)])
    await engine.aclose()


@pytest.mark.parametrize("top_p", [1.0, 0.7])
async def test_a_seed_gives_the_same_answer_in_any_batch(tiny: TransformersEngine, top_p: float) -> None:
    prompts = await embed_all(tiny)
    sampled = [
        request(prompt, 12, temperature=1.0, top_p=top_p, seed=seed) for seed in (1, 2, 3) for prompt in prompts[:2]
    ]
    batched = await tiny.generate_batch(sampled)
    for one, together in zip(sampled, batched, strict=True):
        [alone] = await tiny.generate_batch([GenerationRequest(one.prompt, one.sampling)])
        assert alone.token_ids == together.token_ids
    assert len({completion.token_ids for completion in batched[::2]}) == 3


@pytest.mark.parametrize("plan_seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
async def test_rows_that_join_and_leave_in_any_order_do_not_disturb_each_other(
    tiny_folder: Path, plan_seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tta_middleware.engines.decoding.kv_slots as slots

    # Small blocks make the cache grow often.
    monkeypatch.setattr(slots, "_BLOCK", 5)
    engine = TransformersEngine(str(tiny_folder), dtype="float64", max_batch=3)
    plan = random.Random(plan_seed)
    texts = tuple("word " * plan.choice([1, 3, 40]) for _ in range(9))
    requests = [
        request(prompt, plan.choice([1, 4, 9, 25]), temperature=plan.choice([0.0, 1.0]), seed=plan.randrange(99))
        for prompt in await embed_all(engine, texts)
    ]
    together = await engine.generate_batch(requests)
    for one, completion in zip(requests, together, strict=True):
        [alone] = await engine.generate_batch([one])
        assert completion.token_ids == alone.token_ids
    await engine.aclose()


async def test_several_eos_ids_all_end_an_answer(tiny_folder: Path, tmp_path: Path) -> None:
    import json
    import shutil

    plain = TransformersEngine(str(tiny_folder), dtype="float64")
    prompt = (await embed_all(plain, ("Hi",)))[0]
    [whole] = await plain.generate_batch([request(prompt, 8)])
    await plain.aclose()
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    early = whole.token_ids[3]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, early]}))
    engine = TransformersEngine(str(folder), dtype="float64")
    [cut] = await engine.generate_batch([request(prompt, 8)])
    assert cut.finish_reason == "stop"
    assert cut.token_ids == whole.token_ids[: whole.token_ids.index(early) + 1]
    await engine.aclose()


async def test_moved_embeddings_change_the_answer_and_not_the_prompt(smollm2: TransformersEngine) -> None:
    prompt = (await embed_all(smollm2, ("Name a colour.",)))[0]
    other = (await embed_all(smollm2, ("Name a planet.",)))[0]
    assert prompt.matrix.shape == other.matrix.shape
    here, there = await smollm2.generate_batch([request(prompt, 12), request(prompt.moved(other.matrix), 12)])
    [meant] = await smollm2.generate_batch([request(other, 12)])
    assert here.text != there.text
    assert there.token_ids == meant.token_ids


async def test_likelihood_is_that_of_the_whole_forward_pass(smollm2: TransformersEngine) -> None:
    import torch

    prompt = (await embed_all(smollm2, ("Name a colour.",)))[0]
    answers = [smollm2._loaded.tokenizer(text)["input_ids"] for text in ("Blue.", "A deep, calm blue sky", "x")]
    measured = await smollm2.mean_nll(prompt, answers)
    for ids, nll in zip(answers, measured, strict=True):
        whole = torch.tensor([*prompt.token_ids.tolist(), *ids], device=smollm2._loaded.device)[None]
        with torch.inference_mode(), plain(smollm2) as model:
            logits = model(whole).logits[0, len(prompt.token_ids) - 1 : -1]
        expected = torch.nn.functional.cross_entropy(logits, whole[0, -len(ids) :]).item()
        assert nll == pytest.approx(expected, rel=1e-4)
    assert measured[1] < measured[2]


@pytest.mark.slow
async def test_reduced_precision_with_packed_weights_reads_the_same_likelihoods(smollm2: TransformersEngine) -> None:
    prompt = (await embed_all(smollm2, ("Name a colour.",)))[0]
    ids = smollm2._loaded.tokenizer("Blue is a calm colour, like the sea.")["input_ids"]
    exact = await smollm2.mean_nll(prompt, [ids, ids[:1]])
    engine = TransformersEngine("smollm2", dtype="bfloat16")
    reduced = await engine.mean_nll(prompt, [ids, ids[:1]])
    await engine.aclose()
    assert reduced == pytest.approx(exact, rel=0.02)
