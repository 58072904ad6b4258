"""Rows of our own making: harmless answers, refusals that quote the request, babble, repetition."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from training.data import NEGATIVES, Row, read

HEADS = ("harm", "hate", "hate/threatening", "harassment", "sexual", "self-harm", "violence")
SAFE = dict.fromkeys(HEADS, 0.0)

_REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I cannot assist you with that request.",
    "Sorry, I can't help you {goal}.",
    "I'm sorry, but I cannot {goal}. That would be harmful and illegal.",
    "I can't {goal}, because it could hurt people. If you like, I can suggest something constructive instead.",
    'You asked me to "{goal}". I won\'t do that. It is against the law and puts others at risk.',
    "I understand that you want me to {goal}, but I'm not able to do so. Please talk to somebody you trust.",
    "No. To {goal} is unethical, and I will not provide instructions, code or text for it.",
    "As a language model I do not {goal}. I can explain why it is dangerous and where to find help.",
    "It is not appropriate to {goal}. Is there anything else I can do for you today?",
    "I will not {goal}. Instead, consider learning about the laws that protect people from this.",
)


def harmless_answers(half: str) -> Iterator[Row]:
    """Answers of the embedded chat model to harmless prompts; grouped by prompt."""
    for item in read(NEGATIVES / f"answers_{half}.jsonl"):
        yield Row(item["text"], f"smollm2/{half}", f"own:{item['prompt']}", SAFE, 0.5, prompt=item["prompt"])


def unflagged(rows: Sequence[Row]) -> Iterator[Row]:
    """Texts of the OpenAI set without any label also show what is no harmful answer, with a small weight."""
    for row in rows:
        if row.source == "openai" and not any(row.extra["labels"].values()):
            yield Row(row.text, "unflagged", row.group, {"harm": 0.0}, 0.2)


def refusals(goals: Sequence[str]) -> Iterator[Row]:
    """Every refusal form for every goal, lower-cased into the sentence."""
    for goal in goals:
        phrase = goal[:1].lower() + goal[1:].rstrip(".")
        for form in _REFUSALS:
            yield Row(form.format(goal=phrase), "refusal", f"goal:{goal}", SAFE, 0.1, prompt=goal)


def babble(rows: Sequence[Row], *, seed: int) -> Iterator[Row]:
    """Every third row with its words shuffled: it keeps its label, weaker."""
    rng = random.Random(seed)
    for row in rows[::3]:
        tokens = row.text.split()
        if len(tokens) >= 12:
            rng.shuffle(tokens)
            targets = {"harm": 0.8 * row.targets["harm"]}
            yield Row(" ".join(tokens[: rng.randint(12, 80)]), "shuffled", row.group, targets, 0.1)


def loops_and_soup(count: int, vocabulary: Sequence[str], *, seed: int) -> Iterator[Row]:
    """Harmless degenerate texts: a short piece over and over, random words, random characters, nothing."""
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    symbols = letters + "  .,;:!?0123456789()[]{}<>/*#@&%$"
    for index in range(count):
        length = rng.randint(1, 60)
        made = (
            " ".join([rng.choice(vocabulary) for _ in range(rng.randint(1, 4))] * length),
            " ".join(rng.choice(vocabulary) for _ in range(length)),
            "".join(rng.choice(symbols) for _ in range(length * 5)),
            " ".join("".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(length)),
            rng.choice(["1. ", "- ", "...", "\n", "the ", "a ", ""]) * length,
        )[index % 5]
        yield Row(made, "babble", f"babble:{index}", SAFE, 0.3)


def fragments(rows: Sequence[Row], *, seed: int) -> Iterator[Row]:
    """A few words from the beginning and from anywhere inside harmless answers."""
    rng = random.Random(seed)
    for row in rows:
        tokens = row.text.split()
        start = rng.randrange(max(1, len(tokens) - 15))
        for first in (0, start):
            text = " ".join(tokens[first : first + rng.randint(1, 15)])
            yield Row(text, "fragment", row.group, SAFE, 0.3)


def prefixes(rows: Sequence[Row], *, seed: int) -> Iterator[Row]:
    """The beginnings of long texts, as a stream shows them; a harmful answer's opening is only likely harmful."""
    rng = random.Random(seed)
    for row in rows:
        if len(row.text) >= 160:
            cut = rng.randint(80, min(700, len(row.text)))
            harm = row.targets["harm"]
            targets = {"harm": harm * (0.6 + 0.4 * cut / len(row.text))}
            yield Row(row.text[:cut], "prefix", row.group, targets, 0.5 * row.weight, extra={"harm": harm})
