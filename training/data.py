"""The labelled rows, each with a group that a split must keep together."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

LABELLED = Path("../shared/data/labelled")
NEGATIVES = Path(__file__).parent / "negatives"

TOPICS = {
    "Harassment/Discrimination": "hate",
    "Physical harm": "violent",
    "Sexual/Adult content": "sexual",
}
"""JailbreakBench categories that stand for one topic; every other category is ``illicit``."""

OPENAI = {
    "H": "hate",
    "H2": "hate/threatening",
    "HR": "harassment",
    "S": "sexual",
    "SH": "self-harm",
    "V": "violence",
}
"""Labels of the OpenAI set that have enough positive rows to train and measure a category (V2 has ten)."""

ATTRIBUTES = (
    "toxicity",
    "severe_toxicity",
    "insult",
    "identity_attack",
    "threat",
    "sexually_explicit",
    "profanity",
    "flirtation",
)
"""Perspective's attributes; the base models predict them, and every head reads the base models."""


@dataclass(frozen=True, slots=True)
class Row:
    """A text with what is known of it.

    Attributes:
        targets: probability per head; a head that is absent is unknown.
        group: rows of one group never stand on both sides of a split.
        weight: how much the row counts while fitting; evaluation ignores it.
    """

    text: str
    source: str
    group: str
    targets: Mapping[str, float]
    weight: float = 1.0
    prompt: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def fold(group: str, folds: int, salt: str = "") -> int:
    """Which of ``folds`` parts a group belongs to; stable over runs and machines."""
    return crc32(f"{salt}:{group}".encode()) % folds


def labelled(folder: Path = LABELLED) -> list[Row]:
    """Every labelled row, without exact repetitions inside a group."""
    rows = [*responses(folder), *openai(folder), *davidson(folder), *perspective(folder)]
    seen: set[tuple[str, str]] = set()
    unique = []
    for row in rows:
        key = (row.group, row.text)
        if key not in seen:
            seen.add(key)
            unique.append(row)
    return unique


def responses(folder: Path) -> Iterator[Row]:
    """Responses with a harmful flag; grouped by goal across sources (JailbreakBench goals are in three of them)."""
    for item in read(folder / "responses.jsonl"):
        name = item["source"].split()[0].lower()
        benign = item["category"] == "benign"
        source = "refusal_direction/benign" if benign else name
        # GPTFuzz numbers its questions instead of giving them.
        prompt = "" if str(item["prompt"]).isdigit() else item["prompt"]
        group = f"goal:{prompt}" if prompt else f"gptfuzz:{item['prompt']}"
        targets = {"harm": float(item["harmful"])}
        if item["harmful"] and item["category"]:
            topic = TOPICS.get(item["category"], "illicit")
            targets |= {f"topic/{name}": float(name == topic) for name in ("illicit", "violent", "hate", "sexual")}
        yield Row(item["response"], source, group, targets, prompt=prompt, extra={"category": item["category"]})


def openai(folder: Path) -> Iterator[Row]:
    for item in read(folder / "openai_moderation.jsonl"):
        labels = item["labels"]
        targets = {name: float(labels[key]) for key, name in OPENAI.items() if key in labels}
        yield Row(item["text"], "openai", f"openai:{_stem(item['text'])}", targets, extra={"labels": labels})


def davidson(folder: Path) -> Iterator[Row]:
    for item in read(folder / "davidson.jsonl"):
        yield Row(item["text"], "davidson", f"davidson:{_stem(item['text'])}", {}, extra={"label": item["label"]})


def perspective(folder: Path) -> Iterator[Row]:
    for item in read(folder / "perspective.jsonl"):
        scores = {name: value for name, value in item["scores"].items() if value is not None}
        yield Row(item["text"], "perspective", f"perspective:{_stem(item['text'])}", {}, extra={"scores": scores})


def _stem(text: str) -> str:
    """Texts that begin alike (retweets, edited prompts) belong together."""
    return " ".join(text.lower().split()[:6])
