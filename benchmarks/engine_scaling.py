"""Tokens per second at 1 to 32 concurrent sequences: model.generate, our engine, vLLM, and the machine's limits.

    python benchmarks/engine_scaling.py --vllm .venv-vllm/bin/python
    python benchmarks/engine_scaling.py --plain --sizes 1 8 32
    python benchmarks/engine_scaling.py --avx2 --weights loaded --sizes 1 8 32

Each runs in a process of its own that stays up, vLLM under the Python that is given; at every size they decode in turn
and the best of ``--repeat`` runs counts. Greedy answers of ``--tokens`` tokens to prompts of different lengths, all of
them there from the start; prefill is inside the time. OpenMP's settings are those of torch_import.py for the first two
and vLLM's own for vLLM. The limits are those of decoding: every step reads all weights once, and every token multiplies
with each of them once. With ``--plain`` the engine's other way runs as well: the model's own pass and cache, and with
``--weights`` other ways of keeping them. Behind each rate: tokens for each second of processor time, which says more
where neighbours are busy, and the most memory that the process had by the end of that size. ``--avx2`` computes as a
processor without bfloat16 does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, TypeAlias, cast

from avx2 import pretend

from tta_middleware.engines.models import resolve_model
from tta_middleware.engines.prompt.template import render_prompt
from tta_middleware.protocols import Engine
from tta_middleware.types import GenerationRequest, Message, Sampling

TEXT = "Write a long story about a lighthouse keeper who finds a letter in a bottle, and what it says."
MAX_MODEL_LEN = 1024
PLAIN = "ours, plain"
KEPT = "ours, weights "

Rates: TypeAlias = tuple[float, float]
"""Tokens per second, by the clock and of processor time."""


def texts(size: int) -> list[str]:
    words = TEXT.split()
    return [" ".join(words[: len(words) - row % 4]) for row in range(size)]


async def requests(engine: Engine, size: int, tokens: int) -> list[GenerationRequest]:
    prompts = [await engine.embed([Message("user", text)]) for text in texts(size)]
    return [GenerationRequest(prompt, Sampling(max_new_tokens=tokens)) for prompt in prompts]


async def best(run: Callable[[], Awaitable[int]], repeat: int) -> Rates:
    """The best of ``repeat`` runs, after one that warms up."""
    rates = []
    for _ in range(repeat + 1):
        wall, cpu = time.perf_counter(), time.process_time()
        count = await run()
        rates.append((count / (time.perf_counter() - wall), count / (time.process_time() - cpu)))
    return tuple(map(max, zip(*rates[1:], strict=True)))  # type: ignore[return-value]


async def engine_rate(engine: Engine, size: int, tokens: int, repeat: int) -> Rates:
    wanted = await requests(engine, size, tokens)

    async def run() -> int:
        return sum(len(answer.token_ids) for answer in await engine.generate_batch(wanted))

    return await best(run, repeat)


class Plain:
    """transformers' own model.generate."""

    def __init__(self, options: argparse.Namespace) -> None:
        from tta_middleware.engines.torch_import import import_torch, import_transformers

        torch = import_torch()
        folder = str(resolve_model(options.model))
        load = import_transformers().AutoModelForCausalLM.from_pretrained
        self.torch, self.model = torch, load(folder, dtype=getattr(torch, options.dtype)).eval()
        self.tokenizer = import_transformers().AutoTokenizer.from_pretrained(folder)

    async def rate(self, size: int, tokens: int, repeat: int) -> Rates:
        prompts = [render_prompt(self.tokenizer, [Message("user", text)]).token_ids for text in texts(size)]
        longest = max(map(len, prompts))
        ids = self.torch.tensor([[2] * (longest - len(row)) + list(row) for row in prompts])
        mask = self.torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
        lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens}

        async def run() -> int:
            with self.torch.inference_mode():
                self.model.generate(ids, attention_mask=mask, do_sample=False, **lengths)
            return size * tokens

        return await best(run, repeat)


class Child:
    """Measures in a process of its own, when told to."""

    def __init__(self, python: str, kind: str, options: argparse.Namespace, stack: ExitStack) -> None:
        environment = dict(os.environ)
        if kind == "vLLM":
            cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
            environment |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
            environment |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": cores}
            environment.pop("OMP_WAIT_POLICY", None)
        command = [
            python,
            "-W",
            "ignore",
            __file__,
            "--child",
            kind,
            "--dtype",
            options.own_dtype,
            "--model",
            options.model,
        ]
        command += ["--tokens", str(options.tokens), "--repeat", str(options.repeat)]
        command += ["--sizes", *map(str, options.sizes), *(["--avx2"] if options.avx2 else [])]
        self._process = stack.enter_context(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True)
        )
        stack.callback(cast(IO[str], self._process.stdin).close)

    def rate(self, size: int) -> dict[str, float]:
        """Tokens per second by the clock (``rate``) and of processor time (``cpu``), most memory in MiB (``peak``)."""
        cast(IO[str], self._process.stdin).write(f"{size}\n")
        cast(IO[str], self._process.stdin).flush()
        for line in cast(IO[str], self._process.stdout):
            if line.startswith('{"rate":'):
                return dict(json.loads(line))
        raise SystemExit("a measuring process ended; run it with --child by hand to see why")


async def child(options: argparse.Namespace) -> None:
    if options.child == "model.generate":
        plain = Plain(options)
        for line in sys.stdin:
            _tell(await plain.rate(int(line), options.tokens, options.repeat))
        return
    engine = _vllm(options) if options.child == "vLLM" else _ours(options)
    for line in sys.stdin:
        _tell(await engine_rate(engine, int(line), options.tokens, options.repeat))
    await engine.aclose()


def _tell(rates: Rates) -> None:
    print(json.dumps({"rate": rates[0], "cpu": rates[1], "peak": _peak()}), flush=True)


def _peak() -> float:
    """Most memory so far in MiB; where Linux tells, of this program alone: getrusage counts what started it, too."""
    status = Path("/proc/self/status")
    if status.exists():
        [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _vllm(options: argparse.Namespace) -> Engine:
    from tta_vllm import VLLMEngine

    limits = {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": max(options.sizes)}
    engine: Engine = VLLMEngine(options.model, dtype=options.dtype, **limits)
    return engine


def _ours(options: argparse.Namespace) -> Engine:
    from tta_middleware.engines.transformers import TransformersEngine

    settings: dict[str, Any] = {"max_batch": max(options.sizes), "dtype": options.own_dtype}
    if options.child == PLAIN:
        settings["path"] = "plain"
    if options.child.startswith(KEPT):
        settings["weights"] = options.child.removeprefix(KEPT)
    return TransformersEngine(options.model, **settings)


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
        f"Arithmetic: {multiplied / 1e9:.1f} GFLOP/s, so at most {at_most:.0f} tokens/s for any number of them.\n"
    )


def engine_dtype() -> str:
    """What the engine takes on this machine by itself."""
    from tta_middleware.engines.torch_import import import_torch

    torch = import_torch()
    from tta_middleware.engines.decoding.loading import pick_dtype

    return str(pick_dtype("auto", torch.device("cpu"))).removeprefix("torch.")


def compare(options: argparse.Namespace) -> None:
    plain = Plain(options)
    print(limits(plain.model, plain.model.dtype, options.tokens))
    del plain
    kinds = {"model.generate": sys.executable, "ours": sys.executable}
    if options.plain:
        kinds[PLAIN] = sys.executable
    kinds |= {f"{KEPT}{weights}": sys.executable for weights in options.weights}
    if options.vllm:
        kinds["vLLM"] = options.vllm
    print(f"| sequences | {' | '.join(kinds)} |\n|---|{'---|' * len(kinds)}")
    with ExitStack() as stack:
        children = [Child(python, kind, options, stack) for kind, python in kinds.items()]
        for one in children:
            one.rate(1)  # up and warm before the first that counts
        for size in options.sizes:
            found = [one.rate(size) for one in children]
            shown = (f"{one['rate']:.1f} ({one['cpu']:.1f}; {one['peak']:.0f} MiB)" for one in found)
            print(f"| {size} | {' | '.join(shown)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="auto", help="auto is what the engine takes on this machine")
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 4, 8, 16, 32])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--plain", action="store_true", help="the engine's plain path, too")
    parser.add_argument(
        "--weights", nargs="+", default=[], help="as the engine takes them; each in a column of its own"
    )
    parser.add_argument("--avx2", action="store_true", help="compute as a processor with AVX2 and no more does")
    parser.add_argument("--vllm", metavar="PYTHON", help="the Python of an environment with vLLM")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.avx2:
        pretend()
    # The engine is asked for what was asked for here: "auto" is more than a type to it.
    options.own_dtype = options.dtype
    if options.dtype == "auto":
        options.dtype = engine_dtype()
    if options.child:
        asyncio.run(child(options))
    else:
        compare(options)


if __name__ == "__main__":
    main()
