"""Families of transformers, as tiny random models: each runs the way it should, and decodes like its own generate."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models_table
import numpy as np
import pytest
from families import FAMILIES, Family

from tta_middleware.engines.prompt.vocabulary import load_vocabulary
from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.errors import ConfigurationError
from tta_middleware.types import GenerationRequest, Message, PromptEmbeddings, Sampling

TEXTS = ("Hi", "A somewhat longer prompt, so that rows are padded.", "One more, in between.")
LENGTHS = (9, 24, 16)


def marked(family: Family) -> Any:
    """A few in the quick suite, all of them in the slow one."""
    return pytest.param(family, id=family.model_type, marks=() if family.quick else pytest.mark.slow)


@pytest.mark.parametrize("family", [marked(family) for family in FAMILIES])
async def test_a_family_decodes_like_generate_alone_in_a_batch_and_from_moved_rows(
    family: Family, save_model: Callable[[Any], Path]
) -> None:
    folder = str(save_model(family.config()))
    engine = TransformersEngine(folder, dtype="float32", max_batch=2)
    assert (await engine.way())[0] == family.path
    prompts = [await engine.embed([Message("user", text)]) for text in TEXTS]
    prompts[2] = moved(prompts[2])
    # Two places and three rows of different lengths: the third joins when the first leaves.
    requests = [
        GenerationRequest(prompt, Sampling(max_new_tokens=count))
        for prompt, count in zip(prompts, LENGTHS, strict=True)
    ]
    batched = [list(completion.token_ids) for completion in await engine.generate_batch(requests)]
    alone = [list((await engine.generate_batch([request]))[0].token_ids) for request in requests]
    [score] = await engine.mean_nll(prompts[1], [batched[1]])
    await engine.aclose()
    expected = [generated(folder, prompt, count) for prompt, count in zip(prompts, LENGTHS, strict=True)]
    assert batched == expected
    assert alone == expected
    assert await plainly(folder, requests) == expected
    assert readable(folder) == family.vocabulary
    assert score == pytest.approx(likelihood(folder, prompts[1], batched[1]), rel=1e-3)


async def plainly(folder: str, requests: list[GenerationRequest]) -> list[list[int]]:
    """The same by the model's own cache, whichever way it takes by itself."""
    engine = TransformersEngine(folder, dtype="float32", path="plain")
    done = await engine.generate_batch(requests)
    await engine.aclose()
    return [list(completion.token_ids) for completion in done]


def readable(folder: str) -> bool:
    """Whether an engine whose model decodes elsewhere (vLLM) finds the embeddings that it has to send."""
    try:
        load_vocabulary(Path(folder))
    except ConfigurationError:
        return False
    return True


def moved(prompt: PromptEmbeddings) -> PromptEmbeddings:
    """As a repair moves it: the user's rows, a tenth of their length aside."""
    matrix = prompt.matrix.copy()
    noise = np.random.default_rng(0).standard_normal(matrix.shape).astype(np.float32)
    noise *= 0.1 * np.linalg.norm(matrix, axis=1, keepdims=True) / np.linalg.norm(noise, axis=1, keepdims=True)
    matrix[prompt.user_mask] += noise[prompt.user_mask]
    return prompt.moved(matrix)


def own(folder: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def given(model: Any, prompt: PromptEmbeddings) -> dict[str, Any]:
    """What generate takes for the same embeddings; what is looked up by layer stays that of the tokens."""
    import torch

    rows = torch.from_numpy(np.ascontiguousarray(prompt.matrix))[None]
    if not hasattr(model.model if hasattr(model, "model") else model, "get_per_layer_inputs"):
        return {"inputs_embeds": rows}
    ids = torch.from_numpy(prompt.token_ids)[None]
    return {"inputs_embeds": rows, "per_layer_inputs": model.model.get_per_layer_inputs(ids)}


def generated(folder: str, prompt: PromptEmbeddings, count: int) -> list[int]:
    """Greedy tokens of the model's own generate."""
    import torch

    model = own(folder)
    inputs = given(model, prompt)
    mask = torch.ones(inputs["inputs_embeds"].shape[:2], dtype=torch.long)
    takes_rows = "inputs_embeds" in inspect.signature(model.prepare_inputs_for_generation).parameters
    odd = "per_layer_inputs" in inputs or hasattr(model.config, "original_max_position_embeddings")
    if odd or not takes_rows:
        return step_by_step(model, prompt, count)
    with torch.inference_mode():
        out = model.generate(**inputs, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=2)
    return list(out[0].tolist())


def step_by_step(model: Any, prompt: PromptEmbeddings, count: int) -> list[int]:
    """The same by whole passes: where generate refuses embeddings, or does not count them."""
    import torch

    ids: list[int] = []
    for _ in range(count):
        with torch.inference_mode():
            ids.append(int(whole(model, prompt, ids)[-1].argmax()))
        if ids[-1] == 2:
            break
    return ids


def whole(model: Any, prompt: PromptEmbeddings, ids: list[int]) -> Any:
    """Logits of the prompt's rows and some tokens behind them, in one pass."""
    import torch

    inputs = given(model, prompt)
    if ids:
        more = torch.tensor(ids)[None]
        inputs["inputs_embeds"] = torch.cat([inputs["inputs_embeds"], model.get_input_embeddings()(more)], dim=1)
        if "per_layer_inputs" in inputs:
            extra = model.model.get_per_layer_inputs(more)
            inputs["per_layer_inputs"] = torch.cat([inputs["per_layer_inputs"], extra], dim=1)
    return model(**inputs, use_cache=False).logits[0]


def likelihood(folder: str, prompt: PromptEmbeddings, ids: list[int]) -> float:
    import torch

    with torch.inference_mode():
        logits = whole(own(folder), prompt, ids)[len(prompt.matrix) - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits.float(), torch.tensor(ids)))


def test_the_table_in_the_docs_is_what_these_tests_assert(tokenizer: Any) -> None:
    text = models_table.DOC.read_text(encoding="utf-8")
    made = models_table.with_table(text, models_table.table(tokenizer))
    assert text == made, "run: python tests/engines/models_table.py"
    assert {family.talk for family in FAMILIES} - {""} == set(models_table.CONVENTIONS)


async def test_a_model_that_cannot_run_packed_is_refused_where_that_is_asked_for(
    save_model: Callable[[Any], Path], tiny_sizes: dict[str, Any]
) -> None:
    from transformers import Lfm2Config

    config = Lfm2Config(**{**tiny_sizes, "layer_types": ["conv", "full_attention"]})
    engine = TransformersEngine(str(save_model(config)), path="packed")
    with pytest.raises(ConfigurationError, match="conv layers"):
        await engine.load()


async def test_a_model_that_reads_ahead_is_refused(
    save_model: Callable[[Any], Path], tiny_sizes: dict[str, Any]
) -> None:
    from transformers import BertConfig

    engine = TransformersEngine(str(save_model(BertConfig(**tiny_sizes))))
    with pytest.raises(ConfigurationError, match="read ahead"):
        await engine.load()
