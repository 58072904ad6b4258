"""A batch of prompts against a serial loop of ``invoke``, on one loaded model in one process.

    python benchmarks/batch_vs_loop.py --prompts 200

The same prompts are answered three ways: one ``invoke`` after the other, ``abatch`` of the chat model, and the job of
``tta batch`` into a file. All three are guarded. The ratio is that of wall-clock seconds within this run; the model is
loaded and warm before the first.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from tta_middleware import TTAChatModel
from tta_middleware.batch.flow import Flow
from tta_middleware.batch.input import Item, Source
from tta_middleware.batch.records import as_record
from tta_middleware.batch.shard import Order, Shard
from tta_middleware.batch.target import output_to
from tta_middleware.cli.bench_prompts import harmless_prompts
from tta_middleware.guard.guard import Guard
from tta_middleware.types import Sampling


def timed(work: Callable[[], list[str]]) -> tuple[dict[str, float], list[str]]:
    wall, cpu = time.perf_counter(), time.process_time()
    answers = work()
    spent = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    return {name: round(value, 2) for name, value in spent.items()}, answers


def loop(model: TTAChatModel, prompts: list[str]) -> list[str]:
    return [model.invoke(prompt).text for prompt in prompts]


def abatch(model: TTAChatModel, prompts: list[str], concurrency: int) -> list[str]:
    answers = asyncio.run(model.abatch(prompts, {"max_concurrency": concurrency}))
    return [answer.text for answer in answers]


async def job(model: TTAChatModel, source: Path, target: Path, concurrency: int) -> None:
    """What ``tta batch`` does, over a model that is loaded."""
    sampling = Sampling(max_new_tokens=model.max_new_tokens)
    guard = Guard(model._engine(model.model), model.runtime.moderator(model.moderator))

    async def answer(item: Item) -> dict:
        return {"id": item.prompt.id, **as_record(await guard.answer(item.prompt.messages, item.sampling))}

    with output_to(str(target), retry_errors=False) as output:
        output.open()
        flow = Flow(answer, output.write, lambda _count: None, concurrency, Order.INPUT)
        await flow.run(Source(str(source), sampling).items(Shard()))


def batch_job(model: TTAChatModel, prompts: list[str], concurrency: int) -> list[str]:
    with TemporaryDirectory() as folder:
        source, target = Path(folder, "in.jsonl"), Path(folder, "out.jsonl")
        source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        asyncio.run(job(model, source, target, concurrency))
        return [json.loads(line)["answer"] for line in target.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    prompts = harmless_prompts(options.prompts, options.seed)
    model = TTAChatModel(max_new_tokens=options.max_new_tokens, dtype=options.dtype)
    model.invoke(prompts[0])
    ways: dict[str, Callable[[], list[str]]] = {
        "loop of invoke": lambda: loop(model, prompts),
        "abatch": lambda: abatch(model, prompts, options.concurrency),
        "tta batch": lambda: batch_job(model, prompts, options.concurrency),
    }
    spent, answers = {}, {}
    for name, work in ways.items():
        spent[name], answers[name] = timed(work)
        print(f"{name}: {spent[name]['seconds']} s", flush=True)
    alone = answers["loop of invoke"]
    for name in ("abatch", "tta batch"):
        spent[name]["times_faster_than_the_loop"] = round(
            spent["loop of invoke"]["seconds"] / spent[name]["seconds"], 2
        )
        spent[name]["same_text"] = sum(map(str.__eq__, alone, answers[name]))
    print(json.dumps(vars(options) | spent))


if __name__ == "__main__":
    main()
