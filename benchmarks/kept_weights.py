"""What keeping the weights of linear layers in fewer bytes does to the text, against float32.

    python benchmarks/kept_weights.py PROMPTS --weights float16

PROMPTS is a file of JSON lines with "prompt"; those marked "benign": false are left out. float32 answers them greedily.
Then, for each way of keeping weights: how many nats a token of those answers costs, at how many of their tokens it
would have chosen the same, how many of its own greedy answers are the same, and what its own answers cost float32.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path
from statistics import fmean
from typing import Any

from avx2 import pretend

from tta_middleware.types import GenerationRequest, Message, PromptEmbeddings, Sampling


async def answers(engine: Any, prompts: list[PromptEmbeddings], tokens: int) -> list[tuple[int, ...]]:
    done = await engine.generate_batch(
        [GenerationRequest(prompt, Sampling(max_new_tokens=tokens)) for prompt in prompts]
    )
    return [answer.token_ids for answer in done]


async def nats(engine: Any, prompts: list[PromptEmbeddings], texts: list[tuple[int, ...]]) -> float:
    """A token's, over all texts."""
    found = [
        (await engine.mean_nll(prompt, [text]))[0] * len(text) for prompt, text in zip(prompts, texts, strict=True)
    ]
    return sum(found) / sum(map(len, texts))


def agreement(model: Any, prompts: list[PromptEmbeddings], texts: list[tuple[int, ...]]) -> float:
    """At how many of the texts' tokens the model's likeliest is the text's."""
    import torch

    from tta_middleware.engines.decoding.beside import Segment
    from tta_middleware.engines.decoding.kv_slots import KVSlots
    from tta_middleware.engines.decoding.packed import Pass

    hits = []
    for prompt, text in zip(prompts, texts, strict=True):
        columns = torch.cat([model.columns(prompt), model.token_columns(text[:-1])])
        segment = Segment(columns, None, keep=len(text))
        chosen = model.forward(columns[None], Pass(KVSlots(0), [segment])).argmax(dim=-1).tolist()
        hits += [here == there for here, there in zip(chosen, text, strict=True)]
    return fmean(hits)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--weights", nargs="+", default=["float16"])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--avx2", action="store_true", help="compute as a processor with AVX2 and no more does")
    options = parser.parse_args()
    if options.avx2:
        pretend()
    from tta_middleware.engines.transformers import TransformersEngine

    rows = [json.loads(line) for line in options.prompts.read_text(encoding="utf-8").splitlines()]
    asked = [row["prompt"] for row in rows if row.get("benign", True)][: options.count]
    exact = TransformersEngine(options.model, dtype="float32")
    prompts = [await exact.embed([Message("user", text)]) for text in asked]
    expected = await answers(exact, prompts, options.tokens)
    print(f"{len(prompts)} prompts, {sum(map(len, expected))} tokens")
    print(
        "| weights | nats a token of float32's answers | same next token | answers unchanged | own answers in float32 |"
    )
    print("|---|---|---|---|---|")
    print(f"| float32 | {await nats(exact, prompts, expected):.4f} | | | |", flush=True)
    for weights in options.weights:
        engine = TransformersEngine(options.model, weights=weights)
        cost = await nats(engine, prompts, expected)
        own = await answers(engine, prompts, options.tokens)
        same = sum(here == there for here, there in zip(own, expected, strict=True))
        loaded: Any = engine._loaded
        share = agreement(loaded, prompts, expected)
        await engine.aclose()
        print(
            f"| {weights} | {cost:.4f} | {share:.4f} | {same} of {len(own)} | {await nats(exact, prompts, own):.4f} |",
            flush=True,
        )
    await exact.aclose()


if __name__ == "__main__":
    asyncio.run(main())
