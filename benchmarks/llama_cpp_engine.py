"""llama.cpp and our own engine on the same GGUF file: tokens by second of a processor, and how alike the answers are.

    python benchmarks/llama_cpp_engine.py
    python benchmarks/llama_cpp_engine.py --model models/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf --sizes 1 8

Every contender runs in a process of its own with one thread, and at every size they take turns; the best of
``--repeat`` runs counts. Processor time is counted and no wall time, so that a busy machine matters less; prompts are
inside. *as on AVX2* lets torch, MKL and oneDNN use nothing newer, with weights in float32: what a processor without
bfloat16 does. The wheel of llama.cpp never uses anything newer. Answers are greedy; *alike* is how many tokens they
have in common before the first that differs, and nats a token are those of llama.cpp's answers by both.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from engine_scaling import requests
from tta_llama_cpp import LlamaCppEngine

from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.protocols import Engine
from tta_middleware.types import GenerationRequest, Message, Sampling

ONE = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
# name: engine, options, settings of the process
CONTENDERS: dict[str, tuple[type[Engine], dict[str, Any], dict[str, str]]] = {
    "llama.cpp": (LlamaCppEngine, {"threads": 1, "context": 512, "max_batch": 32}, ONE),
    "ours": (TransformersEngine, {}, ONE),
    "ours, float32, as on AVX2": (TransformersEngine, {"dtype": "float32"}, {**ONE, **AVX2}),
}
QUESTIONS = (
    "Name three cities in Italy.",
    "Why is the sky blue?",
    "Write two sentences about rain.",
    "How do I boil an egg?",
    "What is a lighthouse for?",
    "Explain what a prime number is.",
    "Give me a name for a black cat.",
    "What do bees eat?",
    "Translate 'good morning' into French.",
    "How many days has a leap year?",
)


async def rate(engine: Engine, size: int, tokens: int) -> float:
    wanted = await requests(engine, size, tokens)
    start = time.process_time()
    found = await engine.generate_batch(wanted)
    return sum(len(completion.token_ids) for completion in found) / (time.process_time() - start)


async def answers(engine: Engine, given: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Greedy answers to the questions, and how likely each of ``given`` is."""
    prompts = [await engine.embed([Message("user", text)]) for text in QUESTIONS]
    found = [
        list((await engine.generate_batch([GenerationRequest(prompt, Sampling(max_new_tokens=48))]))[0].token_ids)
        for prompt in prompts
    ]
    likely = [(await engine.mean_nll(prompt, [ids]))[0] for prompt, ids in zip(prompts, given or found, strict=True)]
    return {"ids": found, "nll": statistics.fmean(likely)}


async def work(model: str, name: str) -> None:
    """Answer commands of the parent, one a line."""
    kind, options, _ = CONTENDERS[name]
    engine = kind(model, **options)
    await engine.load()
    await rate(engine, 1, 4)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        found = await rate(engine, **command["rate"]) if "rate" in command else await answers(engine, command["given"])
        print(json.dumps(found), flush=True)
    await engine.aclose()


class Worker:
    def __init__(self, model: str, name: str, stack: ExitStack) -> None:
        command = [sys.executable, __file__, "--model", model, "--worker", name]
        self._process = stack.enter_context(
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **CONTENDERS[name][2]},
            )
        )
        self.answer()

    def ask(self, **command: Any) -> Any:
        assert self._process.stdin
        print(json.dumps(command), file=self._process.stdin, flush=True)
        return self.answer()

    def answer(self) -> Any:
        assert self._process.stdout
        return json.loads(self._process.stdout.readline())


def common(left: Sequence[int], right: Sequence[int]) -> int:
    return next((at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        asyncio.run(work(arguments.model, arguments.worker))
        return
    with ExitStack() as stack:
        workers = {name: Worker(arguments.model, name, stack) for name in CONTENDERS}
        print("tokens by second of a processor |", " | ".join(f"{size} at once" for size in arguments.sizes))
        best = {name: [0.0] * len(arguments.sizes) for name in workers}
        for at, size in enumerate(arguments.sizes):
            for _ in range(arguments.repeat):
                for name, worker in workers.items():
                    found = worker.ask(rate={"size": size, "tokens": arguments.tokens})
                    best[name][at] = max(best[name][at], found)
        for name, rates in best.items():
            print(name, "|", " | ".join(f"{found:.0f}" for found in rates), flush=True)
        told = workers["llama.cpp"].ask(given=[])
        for name in list(workers)[1:]:
            other = workers[name].ask(given=told["ids"])
            shared = [common(a, b) for a, b in zip(told["ids"], other["ids"], strict=True)]
            lengths = sum(len(ids) for ids in told["ids"])
            print(f"{name}: alike {sum(shared)} of {lengths}; nats a token {told['nll']:.3f} and {other['nll']:.3f}")


if __name__ == "__main__":
    main()
