"""Tokens per second at 1 to 32 concurrent sequences: model.generate, our engine, vLLM, and the machine's limits.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/engine_scaling.py --vllm .venv-vllm/bin/python

vLLM runs under the Python that is given, as a process that stays up; at every size the engines decode in turn and the
best of ``--repeat`` runs counts. Greedy answers of ``--tokens`` tokens to prompts of different lengths, all of them
there from the start; prefill is inside the time. The limits are those of decoding: every step reads all weights once,
and every token multiplies with each of them once.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import IO, Any, cast

from tta_middleware.engines.models import resolve_model
from tta_middleware.protocols import Engine
from tta_middleware.types import GenerationRequest, Message, Sampling

TEXT = "Write a long story about a lighthouse keeper who finds a letter in a bottle, and what it says."
MAX_MODEL_LEN = 1024


def texts(size: int) -> list[str]:
    words = TEXT.split()
    return [" ".join(words[: len(words) - row % 4]) for row in range(size)]


async def requests(engine: Engine, size: int, tokens: int) -> list[GenerationRequest]:
    prompts = [await engine.embed([Message("user", text)]) for text in texts(size)]
    return [GenerationRequest(prompt, Sampling(max_new_tokens=tokens)) for prompt in prompts]


async def best(run: Callable[[], Awaitable[int]], repeat: int) -> float:
    """Tokens per second of the fastest of ``repeat`` runs, after one that warms up."""
    rates = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        count = await run()
        rates.append(count / (time.perf_counter() - start))
    return max(rates[1:])


async def engine_rate(engine: Engine, size: int, tokens: int, repeat: int) -> float:
    wanted = await requests(engine, size, tokens)

    async def run() -> int:
        return sum(len(answer.token_ids) for answer in await engine.generate_batch(wanted))

    return await best(run, repeat)


async def generate_rate(model: Any, engine: Engine, size: int, tokens: int, repeat: int) -> float:
    import torch

    rows = [request.prompt.token_ids.tolist() for request in await requests(engine, size, tokens)]
    longest = max(map(len, rows))
    ids = torch.tensor([[2] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])

    async def run() -> int:
        with torch.inference_mode():
            model.generate(ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        return size * tokens

    return await best(run, repeat)


class VLLMProcess:
    """Measures in another environment, when told to."""

    def __init__(self, python: str, options: argparse.Namespace, stack: ExitStack) -> None:
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        environment = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
        environment |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": cores} | os.environ
        command = [python, "-W", "ignore", __file__, "--child", "--dtype", options.dtype, "--model", options.model]
        command += ["--tokens", str(options.tokens), "--repeat", str(options.repeat)]
        self._process = stack.enter_context(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True)
        )
        stack.callback(cast(IO[str], self._process.stdin).close)

    def rate(self, size: int) -> float:
        cast(IO[str], self._process.stdin).write(f"{size}\n")
        cast(IO[str], self._process.stdin).flush()
        for line in cast(IO[str], self._process.stdout):
            if line.startswith('{"rate":'):
                return float(json.loads(line)["rate"])
        raise SystemExit("the vLLM process ended; run its Python with --child by hand to see why")


async def child(options: argparse.Namespace) -> None:
    from tta_vllm import VLLMEngine

    limits = {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": max(options.sizes)}
    engine = VLLMEngine(options.model, dtype=options.dtype, **limits)
    for line in sys.stdin:
        rate = await engine_rate(engine, int(line), options.tokens, options.repeat)
        print(json.dumps({"rate": rate}), flush=True)
    await engine.aclose()


def bytes_per_second(seconds: float = 2.0) -> float:
    """Bytes read and written by copying 512 MB, the best of the copies in that time."""
    import torch

    source = torch.ones(2**29, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * source.numel() / _fastest(lambda: target.copy_(source), seconds)


def flops_per_second(dtype: Any, seconds: float = 2.0) -> float:
    """Of a product of two 2048 x 2048 matrices."""
    import torch

    left, right = torch.ones(2048, 2048, dtype=dtype), torch.ones(2048, 2048, dtype=dtype)
    return 2 * 2048**3 / _fastest(lambda: left @ right, seconds)


def _fastest(run: Callable[[], Any], seconds: float) -> float:
    run()
    end, fastest = time.perf_counter() + seconds, float("inf")
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest


def parameters(model: Any) -> int:
    """Weights that a token is multiplied with; the embedding table counts once, as the output layer."""
    table = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is table
    return sum(weight.numel() for weight in model.parameters()) - (0 if tied else table.numel())


def limits(model: Any, dtype: Any, tokens: int) -> str:
    """What this machine's memory and arithmetic allow."""
    import torch

    weights, moved, multiplied = parameters(model), bytes_per_second(), flops_per_second(dtype)
    at_one, at_most = moved / (weights * dtype.itemsize), multiplied / (2 * weights)
    return (
        f"{dtype}, {tokens} tokens a sequence, {weights / 1e6:.0f} M weights, {torch.get_num_threads()} threads.\n"
        f"Memory: {moved / 1e9:.1f} GB/s by copying, so at most {at_one:.0f} tokens/s for one sequence.\n"
        f"Arithmetic: {multiplied / 1e9:.0f} GFLOP/s, so at most {at_most:.0f} tokens/s for any number of them.\n"
    )


async def compare(options: argparse.Namespace) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from tta_middleware.engines.transformers import TransformersEngine

    dtype = getattr(torch, options.dtype)
    engine = TransformersEngine(options.model, dtype=options.dtype, max_batch=max(options.sizes))
    plain = AutoModelForCausalLM.from_pretrained(str(resolve_model(options.model)), dtype=dtype).eval()
    print(limits(plain, dtype, options.tokens))
    columns = ["model.generate", "ours", *(["vLLM"] if options.vllm else [])]
    print(f"| sequences | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    with ExitStack() as stack:
        other = VLLMProcess(options.vllm, options, stack) if options.vllm else None
        for size in options.sizes:
            rates = [
                await generate_rate(plain, engine, size, options.tokens, options.repeat),
                await engine_rate(engine, size, options.tokens, options.repeat),
                *([other.rate(size)] if other else []),
            ]
            print(f"| {size} | {' | '.join(f'{rate:.0f}' for rate in rates)} |", flush=True)
    await engine.aclose()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 4, 8, 16, 32])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--vllm", metavar="PYTHON", help="the Python of an environment with vLLM")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    asyncio.run(child(options) if options.child else compare(options))


if __name__ == "__main__":
    main()
