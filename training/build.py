"""Rebuilds the artifacts: ``python -m training.build [--data FOLDER] [--out FOLDER] [--work FOLDER]``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from training import export, judge, synthetic, vectors
from training.calibrate import calibrate, shifted, subdued
from training.data import LABELLED, PLAIN, REQUESTED, Row, fold, labelled
from training.fit import Linear, fit
from training.matrix import Matrices, matrices_of
from training.windowed import Windowed
from tta_middleware.moderation.embedded.text import words
from tta_middleware.moderation.embedded.vectors import WordVectors

PACKAGE = Path(__file__).parent.parent / "tta_middleware" / "moderation" / "embedded"
WORK = Path("out/training")
TOPICS = ("topic/illicit", "topic/violent", "topic/hate", "topic/sexual")
HEADS = ("harm", *synthetic.HEADS[1:], *TOPICS)
CALIBRATED = HEADS[: -len(TOPICS)]
FOLDS = 3
ANSWERS = frozenset({*REQUESTED, *PLAIN})
OWN = frozenset({"smollm2/train", "refusal", "babble", "fragment"})
ORDINARY = (*PLAIN, "smollm2/train", "star1", "past_tense")
"""Harmless answers that say where 0.5 lies; each was held out of training as a whole, or with its goal."""

ALARMS = 0.015
"""Share of ordinary answers, the same number from each source, that may reach 0.5."""

JUDGED = (*sorted(ANSWERS), "openai", "perspective", *sorted(OWN), "prefix")


def corpus(folder: Path) -> list[Row]:
    """All rows that the moderator is fitted on: labelled ones and our own."""
    rows = [row for row in labelled(folder) if row.source in (*ANSWERS, "openai", "perspective")]
    answers = [row for row in rows if row.source in ANSWERS]
    goals = sorted({row.prompt for row in answers if row.source in ("jailbreakbench", "refusal_direction")})
    own = list(synthetic.harmless_answers("train"))
    vocabulary = sorted({word for row in own for word in row.text.split()})
    return [
        *rows,
        *own,
        *synthetic.prefixes([*answers, *own], seed=1),
        *synthetic.unflagged(rows),
        *synthetic.refusals(goals),
        *synthetic.babble(answers, seed=2),
        *synthetic.loops_and_soup(500, vocabulary, seed=3),
        *synthetic.fragments(own, seed=4),
    ]


@dataclass(frozen=True, slots=True, eq=False)
class Data:
    """Everything that is computed once for many models of the same rows."""

    rows: Sequence[Row]
    grams: Matrices
    words: vectors.Vocabulary
    presence: sp.csr_matrix

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Data:
        tokens = [words(row.text) for row in rows]
        known = vectors.vocabulary(tokens)
        return cls(rows, matrices_of(tokens), known, known.presence(tokens))

    def fit(self, index: NDArray[np.intp], heads: Sequence[str] = HEADS) -> tuple[Linear, WordVectors]:
        """The moderator's two models on some of the rows."""
        chosen = [self.rows[i] for i in index]
        return fit(chosen, self.grams.rows(index), heads), vectors.fit(chosen, self.presence[index], self.words)


def out_of_fold(data: Data) -> NDArray[np.float64]:
    """(rows, calibrated heads) logits by models that never saw the row's group; NaN for rows that nobody judges."""
    windowed = Windowed([row.text for row in data.rows])
    parts = np.array([fold(row.group, FOLDS) for row in data.rows])
    judged = np.array([row.source in JUDGED for row in data.rows])
    logits = np.full((len(data.rows), len(CALIBRATED)), np.nan)
    for part in range(FOLDS):
        models = data.fit(np.flatnonzero(parts != part), CALIBRATED)
        outside = np.flatnonzero((parts == part) & judged)
        logits[outside] = windowed.logits(*models, outside.tolist())
    return logits


Vector = NDArray[np.float64]


def calibration_set(rows: Sequence[Row], head: str) -> tuple[NDArray[np.intp], Vector, Vector]:
    """Indices, targets and weights of the rows that define a head's probabilities.

    Harm: the labelled answers, whole and as prefixes. Categories: the OpenAI set, whose labels they are named after.
    Answers to harmless prompts are the common case in use and count in full towards harm. Beginnings count less: they
    carry the label of an answer they may not have come to yet. Other negatives of ours only show the lower end.
    """
    share = dict.fromkeys(ANSWERS, 1.0) | {"prefix": 0.3, "smollm2/train": 1.0} if head == "harm" else {"openai": 1.0}
    share = dict.fromkeys(OWN, 0.1) | share
    index = [i for i, row in enumerate(rows) if row.source in share and head in row.targets]
    target = [float(rows[i].extra.get(head, rows[i].targets[head])) for i in index]
    return np.array(index), np.array(target), np.array([share[rows[i].source] for i in index])


def half(rows: Sequence[Row], harm: Vector) -> float:
    """The logit of harm that ``ALARMS`` of the ordinary answers reach, the same number of them from each source."""
    sources = np.array([row.source for row in rows])
    known = [harm[sources == source] for source in ORDINARY if (sources == source).any()]
    number = min(map(len, known))
    rng = np.random.default_rng(0)
    mixed = [rng.choice(logits, number, replace=False) for logits in known]
    return float(np.quantile(np.concatenate(mixed), 1 - ALARMS))


def calibrations(rows: Sequence[Row], logits: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Knots per head. Those of harm are moved so that ordinary answers, which are the most in use, stay under 0.5."""
    made = {}
    for column, head in enumerate(CALIBRATED):
        index, target, weight = calibration_set(rows, head)
        knots = calibrate(logits[index, column], target, weight)
        made[head] = shifted(knots, half(rows, logits[:, column])) if head == "harm" else subdued(knots)
    return made


def build_local(folder: Path, work: Path) -> dict[str, NDArray[np.generic]]:
    """The moderator's arrays; the out-of-fold logits stay in ``work`` for the report."""
    data = Data.of(corpus(folder))
    logits = out_of_fold(data)
    np.save(work / "local_logits.npy", logits)
    return export.arrays(*data.fit(np.arange(len(data.rows))), calibrations(data.rows, logits))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=LABELLED, help="folder with the labelled .jsonl files")
    parser.add_argument("--out", type=Path, default=PACKAGE, help="folder for the artifacts")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for what the report reads")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for name, build in (("local.npz", build_local), ("local_b.npz", judge.build)):
        started = time.monotonic()
        digest = export.write(args.out / name, build(args.data, args.work))
        size = (args.out / name).stat().st_size
        print(f"{name} {size} bytes sha256 {digest} in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
