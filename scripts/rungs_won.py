"""Which rung of ``race`` gave the repair, by model: read from runs of ``tta eval``, nothing is decoded.

    python scripts/rungs_won.py Qwen=out/qwen-main SmolLM2=out/smol-main

A record names the move that won. Older ones do not; for these the ladder is walked again: ``race`` asks one rung at a
time, and which comes next depends on the scores alone, which every record keeps. A walk whose last rung moves rows
where the record says that none were moved, or the other way round, is left out and counted. Only the first seed's
repairs count: a greedy rung says the same under every seed. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tta_middleware.evaluation import tables
from tta_middleware.files.jsonl import Record
from tta_middleware.methods import Race
from tta_middleware.methods.base import Start
from tta_middleware.policy import Policy, StagePolicies
from tta_middleware.types import PromptEmbeddings

RACE = Race()
MOVED = {move.label: bool(move.words) for move in RACE.ladder}


@dataclass(frozen=True)
class Asked:
    """One answer of a repair; ``again`` if it was sampled: a second try, or a later round of the ladder."""

    rung: str
    again: bool


@dataclass
class Counts:
    """Of one run. ``asked`` and ``won`` are by rung, ``sampled`` of those that won; ``odd`` walks fit no record."""

    asked: Counter[str] = field(default_factory=Counter)
    won: Counter[str] = field(default_factory=Counter)
    sampled: int = 0
    odd: int = 0

    def add(self, walk: Sequence[Asked], record: Record) -> None:
        last = walk[-1]
        named = record.get("move") or last.rung
        if named != last.rung or MOVED[last.rung] != bool(record["relative_move"]):
            self.odd += 1
            return
        self.asked.update(one.rung for one in walk)
        self.won[last.rung] += 1
        self.sampled += last.again


def start_at(loss: float) -> Start:
    """A start that lets every rung be asked; where its rows move to does not matter here."""
    row = np.ones((1, 2), dtype=np.float32)
    prompt = PromptEmbeddings(row, np.zeros(1, dtype=np.int64), np.ones(1, dtype=bool))
    needs = RACE.needs
    return Start(
        prompt,
        loss,
        np.random.default_rng(0),
        dict.fromkeys(needs.words, row[0]),
        dict.fromkeys(needs.reminders, prompt),
        {words: {0: 1.0} for words in needs.words},
    )


def walked(record: Record, limit: float) -> list[Asked]:
    """The rungs of one repair in the order of asking; ``limit`` is the score from which a candidate is flagged.

    Raises:
        ValueError: several rungs were asked for side by side.
    """
    optimiser, walk = RACE.build(start_at(record["baseline"]["score"] - limit)), []
    for step in record["steps"]:
        if len(step["scores"]) > 1:
            raise ValueError(f"prompt {record['id']!r}: rungs were asked for side by side, so their order is not known")
        [proposal] = optimiser.ask(1)
        walk.append(Asked(proposal.label, proposal.temperature is not None))
        if step["scores"]:
            optimiser.tell([proposal], [step["scores"][0] - limit])
    return walk


def counted(folder: Path) -> Counts:
    """What ``race`` did in a run under seed 0, over every prompt that it neutralised.

    Raises:
        SystemExit: the run's ``race`` had other settings than today's.
    """
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    if run["methods"].get("race") != repr(RACE):
        raise SystemExit(f"{folder}: its race is not the one of this version, so its ladder cannot be walked again")
    policies = StagePolicies.of(Policy.model_validate(run["settings"]["policy"]))
    counts = Counts()
    for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines(keepends=True):
        record = json.loads(line) if line.endswith("\n") else {}
        mine = (record.get("method"), record.get("seed")) == ("race", 0)
        if mine and record["neutralised"] and record["steps"]:
            counts.add(walked(record, policies.repair.limit(record["final"]["category"])), record)
    return counts


def table(runs: Mapping[str, Counts]) -> str:
    """Rungs by what they won, of how often they were asked for, and their share of all repairs."""
    head = ["rung", *(cell for name in runs for cell in (f"{name}: won / asked", "of all"))]
    rows = [[label, *(cell for counts in runs.values() for cell in cells(counts, label))] for label in MOVED]
    ends: list[list[Any]] = [
        ["all repairs", *(cell for counts in runs.values() for cell in (counts.won.total(), "100%"))],
        ["of these sampled", *(cell for counts in runs.values() for cell in (counts.sampled, ""))],
        ["left out", *(cell for counts in runs.values() for cell in (counts.odd, ""))],
    ]
    return tables.markdown([head, *rows, *[[str(cell) for cell in row] for row in ends]])


def cells(counts: Counts, label: str) -> tuple[str, str]:
    won, asked = counts.won[label], counts.asked[label]
    return f"{won} / {asked}", tables.percent(won / max(1, counts.won.total()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN")
    named = (word.partition("=") for word in parser.parse_args().runs)
    print(table({name: counted(Path(folder)) for name, _, folder in named}))
