"""How fluent the answers are that an evaluation calls neutralised: mean NLL under the unmoved model, in nats per token.

    python benchmarks/answer_fluency.py RESULTS.jsonl PROMPTS.jsonl [--model smollm2]

Reads the results of ``tta eval``. Texts that the second judge flagged are cut there and measured as
far as they go.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from tta_middleware import Message
from tta_middleware.engines.transformers import TransformersEngine


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


async def main(results: Path, prompts: Path, model: str) -> None:
    engine = TransformersEngine(model)
    asked = {row["id"]: row["prompt"] for row in rows(prompts)}
    nlls: dict[str, list[float]] = defaultdict(list)
    for row in rows(results):
        if row["neutralised"]:
            prompt = await engine.embed([Message("user", asked[row["id"]])])
            # The answer's ids as the model would read them: the rows after the prompt.
            whole = await engine.embed([Message("user", asked[row["id"]])], assistant_prefix=row["final"]["text"])
            ids = whole.token_ids[len(prompt.token_ids) :].tolist()
            nlls[row["method"]] += await engine.mean_nll(prompt, [ids])
    print("| method | neutralised | median NLL | 90% | highest |\n|---|---|---|---|---|")
    for method, found in nlls.items():
        median, most, highest = np.quantile(found, [0.5, 0.9, 1.0])
        print(f"| {method} | {len(found)} | {median:.2f} | {most:.2f} | {highest:.2f} |")
    await engine.aclose()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--model", default="smollm2")
    arguments = parser.parse_args()
    asyncio.run(main(arguments.results, arguments.prompts, arguments.model))
