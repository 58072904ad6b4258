"""Tokens per second of our engine and of model.generate on a GPU, on random weights of a Llama's shape.

    python benchmarks/engine_gpu.py --shape 1B --tokens 128 --profile 1 32

Weights do not matter for time, so nothing is downloaded: a model of the shape is made, with SmolLM2's tokenizer. The
first run at every size is told apart: it meets lengths that the GPU's libraries have not seen. ``--profile`` tells, for
these sizes, how many kernels a step takes and how long the GPU is busy with them; ``--computed`` records no steps.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tta_middleware.engines.models import resolve_model
from tta_middleware.engines.torch_import import import_torch, import_transformers
from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.types import GenerationRequest, Message, PromptEmbeddings, Sampling

TEXT = "Write a long story about a lighthouse keeper who finds a letter in a bottle, and what it says."
NAMES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
SHAPES = {
    "tiny": (64, 128, 2, 4, 2, 16),
    "135M": (576, 1536, 30, 9, 3, 64),
    "0.5B": (896, 4864, 24, 14, 2, 64),
    "1B": (2048, 8192, 16, 32, 8, 64),
    "8B": (4096, 14336, 32, 32, 8, 128),
}

torch = import_torch()
transformers = import_transformers()


def make_model(shape: str, folder: Path, device: str) -> None:
    """Write a model of random weights; 8B has an output layer of its own, as Llama 3.1 8B has."""
    sizes = dict(zip(NAMES, SHAPES[shape], strict=True))
    common = {"vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0, "eos_token_id": 2}
    config = transformers.LlamaConfig(**sizes, **common, pad_token_id=2, tie_word_embeddings=shape != "8B")
    torch.manual_seed(0)
    with torch.device(device):
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(str(folder))
    transformers.AutoTokenizer.from_pretrained(str(resolve_model("smollm2"))).save_pretrained(str(folder))


async def embedded(engine: TransformersEngine, size: int) -> list[PromptEmbeddings]:
    words = TEXT.split()
    texts = [" ".join(words[: len(words) - row % 4]) for row in range(size)]
    return [await engine.embed([Message("user", text)]) for text in texts]


async def decode(engine: TransformersEngine, prompts: Sequence[PromptEmbeddings], tokens: int) -> None:
    await engine.generate_batch([GenerationRequest(prompt, Sampling(max_new_tokens=tokens)) for prompt in prompts])


async def seconds_to_first(engine: TransformersEngine, prompts: Sequence[PromptEmbeddings]) -> float:
    """Until every sequence has its first token."""
    start = time.perf_counter()
    await decode(engine, prompts, 1)
    return time.perf_counter() - start


def generate(model: Any, prompts: Sequence[PromptEmbeddings], tokens: int) -> None:
    longest = max(len(prompt.token_ids) for prompt in prompts)
    ids = torch.full((len(prompts), longest), 2)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
        mask[row, longest - len(prompt.token_ids) :] = 1
    lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    with torch.inference_mode():
        out = model.generate(ids.to(model.device), attention_mask=mask.to(model.device), do_sample=False, **lengths)
    out.cpu()  # the clock stops when it is here


def rates(run: Any, count: int, repeat: int) -> tuple[float, float]:
    """Tokens per second of the first run, and the most of those that follow."""
    found = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        run()
        found.append(count / (time.perf_counter() - start))
    return found[0], max(found[1:])


def profiled(engine: TransformersEngine, prompts: Sequence[PromptEmbeddings], tokens: int) -> str:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as found:
        asyncio.run(decode(engine, prompts, tokens))
    kernels = [event for event in found.key_averages() if str(event.device_type).endswith("CUDA")]
    busy = sum(event.self_device_time_total for event in kernels) / tokens / 1000
    most = max(kernels, key=lambda event: event.self_device_time_total).key
    return f"  {sum(event.count for event in kernels) / tokens:.0f} kernels a step, {busy:.2f} ms; most in {most[:60]}"


def measure(options: argparse.Namespace, folder: str) -> None:
    engine = TransformersEngine(folder, device=options.device, dtype="bfloat16", max_batch=max(options.sizes))
    asyncio.run(engine.load())
    loaded: Any = engine._loaded
    loaded.eos_ids = frozenset()
    if options.computed:
        loaded.recorder = None
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(loaded.device).eval()
    plain.generation_config.eos_token_id = None
    name = torch.cuda.get_device_name() if loaded.device.type == "cuda" else "CPU"
    print(f"{options.shape} on {name}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(
        "| sequences | generate, first run | generate | ours, first run | ours | all first tokens (s) |\n|" + "---|" * 6
    )
    for size in options.sizes:
        prompts = asyncio.run(embedded(engine, size))
        count = size * options.tokens
        theirs = rates(lambda p=prompts: generate(plain, p, options.tokens), count, options.repeat)
        ours = rates(lambda p=prompts: asyncio.run(decode(engine, p, options.tokens)), count, options.repeat)
        first = asyncio.run(seconds_to_first(engine, prompts))
        print(
            f"| {size} | {theirs[0]:.0f} | {theirs[1]:.0f} | {ours[0]:.0f} | {ours[1]:.0f} | {first:.3f} |", flush=True
        )
        if size in options.profile:
            print(profiled(engine, prompts, options.tokens), flush=True)
    asyncio.run(engine.aclose())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1B")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--profile", nargs="*", type=int, default=[])
    parser.add_argument("--computed", action="store_true", help="record no steps")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_model(options.shape, Path(folder), options.device)
        measure(options, folder)


if __name__ == "__main__":
    main()
