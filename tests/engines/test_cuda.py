"""What only a CUDA device can show: recorded steps, and memory that really runs out."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.types import GenerationRequest, Message, PromptEmbeddings, Sampling

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

SYSTEM = Message("system", "Answer in the words of a lighthouse keeper who has seen many ships come and go. " * 2)


def request(prompt: PromptEmbeddings, tokens: int, **sampling: Any) -> GenerationRequest:
    return GenerationRequest(prompt, Sampling(max_new_tokens=tokens, **sampling))


async def answers(folder: str, requests: list[GenerationRequest], *, recorded: bool, **options: Any) -> list[Any]:
    """Token ids of the answers, and how many recordings there were at the end of the last."""
    engine = TransformersEngine(folder, **options)
    await engine.load()
    recorder, counts = engine._loaded.recorder, [0]
    recorder.possible = recorded
    forward = engine._loaded.forward

    def counted(rows: Any, packed: Any) -> Any:
        found = forward(rows, packed)
        counts.append(recorder.count)
        return found

    engine._loaded.forward = counted
    done = [completion.token_ids for completion in await engine.generate_batch(requests)]
    await engine.aclose()
    return [done, max(counts)]


async def test_auto_is_the_first_cuda_device_in_bfloat16(tiny_folder: Path) -> None:
    engine = TransformersEngine(str(tiny_folder))
    await engine.load()
    assert engine._loaded.device == torch.device("cuda:0")
    assert engine._loaded.dtype == torch.bfloat16
    assert engine.max_batch == 128
    await engine.aclose()


@pytest.mark.parametrize("seed", range(3))
async def test_recorded_steps_give_what_computed_ones_give(
    tiny: TransformersEngine, tiny_folder: Path, seed: int
) -> None:
    plan = random.Random(seed)
    prompts = [await tiny.embed([SYSTEM, Message("user", "word " * plan.choice([1, 9, 150, 600]))]) for _ in range(14)]
    requests = [
        request(prompt, plan.choice([3, 40, 90]), temperature=plan.choice([0.0, 0.8]), seed=plan.randrange(99))
        for prompt in prompts
    ]
    options: dict[str, Any] = {"dtype": "float64", "max_batch": 6}
    computed, none = await answers(str(tiny_folder), requests, recorded=False, **options)
    recorded, some = await answers(str(tiny_folder), requests, recorded=True, **options)
    assert (none, some > 1) == (0, True)
    assert recorded == computed


@pytest.mark.parametrize("family", ["Gemma2Config", "Gemma3TextConfig", "MistralConfig", "GPT2Config"])
async def test_recorded_steps_of_other_families(
    family: str, save_model: Callable[[Any], Path], tiny_sizes: dict[str, Any]
) -> None:
    import transformers

    gpt2 = {"vocab_size": 49152, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.4, "eos_token_id": 2}
    sizes = gpt2 if family == "GPT2Config" else {**tiny_sizes, "sliding_window": 7}
    folder = str(save_model(getattr(transformers, family)(**sizes)))
    engine = TransformersEngine(folder, dtype="float64")
    requests = [request(await engine.embed([Message("user", "word " * n)]), 30) for n in (1, 4, 20)]
    await engine.aclose()
    computed, _ = await answers(folder, requests, recorded=False, dtype="float64")
    recorded, some = await answers(folder, requests, recorded=True, dtype="float64")
    assert some > 0
    assert recorded == computed


async def test_a_step_that_cannot_be_recorded_is_computed(
    save_model: Callable[[Any], Path], tiny_sizes: dict[str, Any]
) -> None:
    from transformers import LlamaConfig

    # Its rotary embedding looks at the positions on the CPU, in every step.
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    folder = str(save_model(LlamaConfig(**tiny_sizes, rope_parameters=dynamic)))
    engine = TransformersEngine(folder, dtype="float64")
    requests = [request(await engine.embed([Message("user", "word " * n)]), 30) for n in (1, 4, 20)]
    await engine.aclose()
    computed, _ = await answers(folder, requests, recorded=False, dtype="float64")
    tried, count = await answers(folder, requests, recorded=True, dtype="float64")
    assert count == 0
    assert tried == computed


def test_a_forked_child_says_that_it_has_no_model(tiny_folder: Path) -> None:
    program = """
import asyncio, os, sys
from tta_middleware.engines.transformers import TransformersEngine

engine = TransformersEngine(sys.argv[1], device="cuda")
asyncio.run(engine.load())
if os.fork() == 0:
    try:
        asyncio.run(engine.load())
    except Exception as error:
        print(error, flush=True)
    os._exit(0)
os.wait()
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tiny_folder)], capture_output=True, text=True, timeout=120
    )
    assert "does not outlive a fork" in done.stdout
    assert done.returncode == 0


@pytest.fixture
def scarce() -> Iterator[Callable[[int], None]]:
    """Sets how many more bytes this process may have on the device."""

    def leave(more: int) -> None:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more) / total)

    yield leave
    torch.cuda.set_per_process_memory_fraction(1.0)


async def test_memory_that_really_runs_out_delays_answers_and_changes_none(
    tiny_folder: Path, scarce: Callable[[int], None]
) -> None:
    engine = TransformersEngine(str(tiny_folder), dtype="float64")
    prompts = [await engine.embed([SYSTEM, Message("user", "word " * count)]) for count in (2500, 9, 1800, 30, 2200)]
    requests = [request(prompt, 24, temperature=0.8, seed=3) for prompt in prompts]
    roomy, _ = await answers(str(tiny_folder), requests, recorded=True, dtype="float64")
    await engine.generate_batch([request(prompts[1], 2)])
    before = torch.cuda.memory_stats()["num_ooms"]
    scarce(30 * 2**20)
    done = [completion.token_ids for completion in await engine.generate_batch(requests)]
    failed = torch.cuda.memory_stats()["num_ooms"] - before
    await engine.aclose()
    assert done == roomy
    assert failed > 0
