"""The labelled rows, each with a group that a split must keep together, and who learns from which.

The moderator and the judge for reports share no source, and no goal of a harmful request: JailbreakBench's goals, which
three sources have in common, are the moderator's, GPTFuzz's questions the judge's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

LABELLED = Path("../shared/data/labelled")
NEGATIVES = Path(__file__).parent / "negatives"

REQUESTED = ("jailbreakbench", "refusal_direction", "shadow", "latent", "safetext", "past_tense", "star1")
"""Answers to harmful requests, or about danger, that the moderator learns from."""

PLAIN = ("refusal_direction/benign", "medquad", "dolly")
"""Ordinary answers that the moderator learns from; nothing in them is harmful."""

JUDGE_ANSWERS = ("gptfuzz", "just_eval", "med_safety", "self_instruct", "owasp")
"""Answers that the judge learns from."""

JUDGE_TEXTS = ("davidson", "hatecheck")
"""Comments that the judge learns from; the moderator has ``openai`` and ``perspective``."""

ANSWERS = {
    "ShadowAlignment": "shadow",
    "SafeText": "safetext",
    "Latent Jailbreak": "latent",
    "just-eval": "just_eval",
    "llm-past-tense": "past_tense",
    "MedSafetyBench": "med_safety",
    "STAR-1": "star1",
    "Dolly": "dolly",
    "self-instruct": "self_instruct",
    "MedQuAD": "medquad",
    "OWASP": "owasp",
}
"""Sources of answers.jsonl by the beginning of their names. ``answers_nc.jsonl`` is never read here: its licences
forbid weights for any use."""

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
    rows = [
        *responses(folder), *answers(folder), *openai(folder), *davidson(folder), *perspective(folder),
        *hatecheck(folder),
    ]  # fmt: skip
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


def answers(folder: Path) -> Iterator[Row]:
    """More answers. Those to requests are grouped by request; ordinary ones, and refusals, by source."""
    for item in read(folder / "answers.jsonl"):
        source = next(name for beginning, name in ANSWERS.items() if item["source"].startswith(beginning))
        alike = source in ("dolly", "medquad", "owasp", "self_instruct", "star1", "med_safety")
        group = f"source:{source}" if alike else f"goal:{item['prompt']}"
        targets = {"harm": float(item["harmful"])}
        if source == "latent" and item["harmful"]:
            targets |= {f"topic/{name}": float(name == "hate") for name in ("illicit", "violent", "hate", "sexual")}
        yield Row(item["response"], source, group, targets, prompt=item["prompt"], extra={"category": item["category"]})


def hatecheck(folder: Path) -> Iterator[Row]:
    """Templates about groups of people. (Ethos, in the same file, is under the GPL and left out.)"""
    for item in read(folder / "hate_text.jsonl"):
        if item["source"].startswith("HateCheck"):
            group = f"hatecheck:{item['category']}"
            yield Row(item["text"], "hatecheck", group, {}, extra={"label": "hate" if item["harmful"] else "neither"})


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
