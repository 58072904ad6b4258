"""Generates harmless answers of the embedded chat model: ``python -m training.generate MODEL_FOLDER HALF OUT``.

Needs torch and transformers. The answers that the build reads are committed (training/negatives/), so a rebuild
needs neither: run this only to make new ones.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from training.prompts import prompts
from tta_middleware.engines.torch_import import import_torch

LENGTHS = (32, 64, 128)
TEMPERATURES = (0.0, 0.7)


def answers(folder: str, questions: Sequence[str], *, size: int = 32, seed: int = 0) -> Iterator[dict[str, Any]]:
    """One answer a question; length and temperature go round robin over batches."""
    torch = import_torch()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    shuffled = [questions[i] for i in torch.randperm(len(questions)).tolist()]
    for turn, start in enumerate(range(0, len(shuffled), size)):
        batch = shuffled[start : start + size]
        tokens, heat = LENGTHS[turn % 3], TEMPERATURES[turn // 3 % 2]
        chats = [
            tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
            for q in batch
        ]
        inputs = tokenizer(chats, return_tensors="pt", padding=True, add_special_tokens=False)
        options: dict[str, Any] = {"do_sample": True, "temperature": heat, "top_k": 0} if heat else {"do_sample": False}
        with torch.inference_mode():
            made = model.generate(**inputs, max_new_tokens=tokens, pad_token_id=tokenizer.pad_token_id, **options)
        texts = tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for question, text in zip(batch, texts, strict=True):
            yield {"prompt": question, "text": text, "max_new_tokens": tokens, "temperature": heat}


def _questions(source: str) -> list[str]:
    if not source.endswith(".jsonl"):
        return prompts(source)
    rows = map(json.loads, Path(source).read_text("utf-8").splitlines())
    return [row["prompt"] for row in rows if row.get("benign", True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="local folder or id of the chat model")
    parser.add_argument("source", help="train, held_out, or a .jsonl file with prompts (only benign ones are used)")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    with args.out.open("w", encoding="utf-8") as sink:
        for row in answers(args.model, _questions(args.source)):
            sink.write(json.dumps(row, ensure_ascii=False) + "\n")
            sink.flush()


if __name__ == "__main__":
    main()
