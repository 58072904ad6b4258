"""Labelled answers of many sources, drawn evenly and cut short: what the benchmarks of moderators are measured on.

Reads a folder with ``responses``, ``answers``, ``answers_nc``, ``hate_text`` and ``openai_moderation`` as JSONL.
Sources whose licence forbids commercial use, or shares alike, are for measuring only; see :data:`FITTED_ON`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SEED = 14
ANSWER, QUESTION = 600, 400
"""Characters of an answer, and of the end of what it answers, that a judging model is shown here."""

OF_EACH = 150
"""Rows of a source and label that a fit is made on at most."""

# By a part of the file's own source field: a short name, and how many rows of either label are drawn at most.
SOURCES = {
    "GPTFuzz": ("gptfuzz", 100),
    "JailbreakBench": ("jbb", 100),
    "Llama Guard 2": ("refdir-lg2", 75),
    "refusal_direction": ("refdir-benign", 75),
    "Latent": ("latent", 40),
    "SafeText": ("safetext", 75),
    "Shadow": ("shadow", 100),
    "just-eval": ("just-eval", 60),
    "past-tense": ("past-tense", 50),
    "self-instruct": ("self-instruct", 60),
    "Dolly": ("dolly", 60),
    "MedQuAD": ("medquad", 50),
    "MedSafety": ("medsafety", 50),
    "OWASP": ("owasp", 50),
    "STAR-1": ("star1", 75),
    "PKU": ("pku", 200),
    "AlpacaEval": ("alpacaeval", 150),
    "Alpaca,": ("alpaca", 60),
    "LIMA": ("lima", 75),
    "safety-tuned": ("safety-tuned", 60),
    "HateCheck": ("hatecheck", 50),
    "Ethos": ("ethos", 50),
}
OPENAI = ("oai", 75)

PEOPLE = ("gptfuzz", "latent", "safetext", "pku", "hatecheck", "ethos", "oai")
"""Sources whose labels people gave; of the others models did, or how the row came about says it."""

OWN = "qwen_answers"
"""Harmless answers to our own questions, a file of ``training/negatives`` (``python -m training.own_answers``)."""

OWN_TIMES = 4
"""How many more rows of these a fit is made on than of another source: they are what a judge meets in use."""

FITTED_ON = (
    *("gptfuzz", "jbb", "refdir-lg2", "refdir-benign", "latent", "safetext", "shadow", "just-eval", "past-tense"),
    *("self-instruct", "medquad", "medsafety", "star1"),
    OWN,
)
"""MIT, Apache-2.0 and CC-BY: what may go into weights that are shipped."""

SEEN_BY_LOCAL = (
    *("jbb", "refdir-lg2", "refdir-benign", "shadow", "safetext", "latent", "past-tense", "star1", "medquad", "dolly"),
    "oai",
)
"""What the embedded moderator was trained on (docs/moderator-card.md): there it seems surer than it is."""

PLAIN_TEXT = ("hatecheck", "ethos", "oai")
"""Texts that answer nothing."""

_OPENAI_KINDS = {"S": "sexual", "H": "hate", "V": "violence", "HR": "harassment", "SH": "self-harm"}
_KINDS = {
    "Disinformation": "deception",
    "Fraud/Deception": "deception",
    "Economic harm": "deception",
    "Expert advice": "expert advice",
    "Government decision-making": "deception",
    "Harassment/Discrimination": "harassment",
    "Malware/Hacking": "malware",
    "Physical harm": "violence",
    "Privacy": "privacy",
    "Sexual/Adult content": "sexual",
    "physical safety": "dangerous advice",
    "illegal activity, hate, malware": "illegal activity",
    "toxic sentence about a group": "hate",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One labelled text; ``kind`` is the kind of harm where the source says it, else empty."""

    id: str
    source: str
    prompt: str
    text: str
    harmful: bool
    kind: str

    @property
    def people(self) -> bool:
        return self.source in PEOPLE


def read_rows(folder: Path) -> list[Row]:
    """All rows of the folder, in the order of its files."""
    found = []
    for name in ("responses", "answers", "answers_nc", "hate_text"):
        for number, raw in _lines(folder / f"{name}.jsonl"):
            found.append(_row(f"{name}:{number}", raw))
    for number, raw in _lines(folder / "openai_moderation.jsonl"):
        labels = [name for name, value in raw["labels"].items() if value]
        kinds = [_OPENAI_KINDS[label.rstrip("23")] for label in labels]
        found.append(Row(f"oai:{number}", OPENAI[0], "", raw["text"], bool(labels), kinds[0] if kinds else ""))
    return [row for row in found if len(row.text.strip()) > 2]


def harmless_rows(path: Path) -> list[Row]:
    """Answers of ``python -m training.generate`` to questions that only look harmful; the file's name is the source."""
    return [Row(f"{path.stem}:{at}", path.stem, one["prompt"], one["text"], False, "") for at, one in _lines(path)]


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file):
            yield number, json.loads(line)


def _row(id_: str, raw: dict[str, Any]) -> Row:
    source = next(short for part, (short, _) in SOURCES.items() if part in raw["source"])
    prompt = raw.get("prompt") or ""
    # GPTFuzz has the number of the question in its place.
    prompt = "" if prompt.strip().isdigit() else prompt
    kind = _KINDS.get(raw.get("category") or "", "")
    kind = "hate" if source in ("hatecheck", "ethos") else kind
    return Row(id_, source, prompt, raw.get("response", raw.get("text")), bool(raw["harmful"]), kind)


def spread(rows: Sequence[Row], most: int) -> NDArray[np.bool_]:
    """(n,) which rows a fit is made on: at most ``most`` of a source and label of :data:`FITTED_ON`, evenly spaced."""
    taken = np.zeros(len(rows), dtype=bool)
    for source in FITTED_ON:
        for harmful in (True, False):
            here = [at for at, row in enumerate(rows) if row.source == source and row.harmful == harmful]
            wanted = most * OWN_TIMES if source == OWN else most
            taken[here[:: max(1, len(here) // wanted)][:wanted]] = True
    return taken


def drawn(rows: list[Row]) -> list[Row]:
    """The rows that are measured, seeded; any beginning of them is even over sources and labels."""
    draw = random.Random(SEED)
    most = dict(SOURCES.values()) | dict([OPENAI])
    groups: dict[tuple[str, bool], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.source, row.harmful), []).append(row)
    keyed = []
    for (source, _), group in sorted(groups.items()):
        draw.shuffle(group)
        taken = group[: most[source]]
        keyed += [((at + draw.random()) / len(taken), row) for at, row in enumerate(taken)]
    return [row for _, row in sorted(keyed, key=lambda one: one[0])]
