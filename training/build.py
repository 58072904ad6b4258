"""Rebuilds the artifacts: ``python -m training.build [--data FOLDER] [--out FOLDER] [--work FOLDER]``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training import export, judge, synthetic
from training.calibrate import calibrate
from training.data import LABELLED, Row, fold, labelled
from training.fit import fit
from training.matrix import Matrices, matrices
from training.windowed import Windowed

PACKAGE = Path(__file__).parent.parent / "tta_middleware" / "moderation" / "embedded"
WORK = Path("out/training")
TOPICS = ("topic/illicit", "topic/violent", "topic/hate", "topic/sexual")
HEADS = ("harm", *synthetic.HEADS[1:], *TOPICS)
CALIBRATED = HEADS[: -len(TOPICS)]
FOLDS = 5
ANSWERS = frozenset({"gptfuzz", "jailbreakbench", "refusal_direction", "refusal_direction/benign"})
OWN = frozenset({"smollm2/train", "refusal", "babble", "fragment"})
JUDGED = (*sorted(ANSWERS), "openai", "davidson", "perspective", *sorted(OWN), "prefix")


def corpus(folder: Path) -> list[Row]:
    """All rows that the moderator is fitted on: labelled ones and our own."""
    rows = labelled(folder)
    answers = [row for row in rows if row.source in ANSWERS]
    goals = sorted({row.prompt for row in answers if row.prompt and not row.source.endswith("benign")})
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


def out_of_fold(rows: Sequence[Row], data: Matrices) -> NDArray[np.float64]:
    """(rows, heads) logits by models that never saw the row's group; NaN for rows that nobody judges."""
    windowed = Windowed([row.text for row in rows])
    parts = np.array([fold(row.group, FOLDS) for row in rows])
    judged = np.array([row.source in JUDGED for row in rows])
    logits = np.full((len(rows), len(HEADS)), np.nan)
    for part in range(FOLDS):
        inside = np.flatnonzero(parts != part)
        model = fit([rows[i] for i in inside], data.rows(inside), HEADS)
        outside = np.flatnonzero((parts == part) & judged)
        logits[outside] = windowed.logits(model, outside.tolist())
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


def calibrations(rows: Sequence[Row], logits: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Knots per head."""
    made = {}
    for column, head in enumerate(CALIBRATED):
        index, target, weight = calibration_set(rows, head)
        made[head] = calibrate(logits[index, column], target, weight)
    return made


def build_local(folder: Path, work: Path) -> dict[str, NDArray[np.generic]]:
    """The moderator's arrays; the out-of-fold logits stay in ``work`` for the report."""
    rows = corpus(folder)
    data = matrices([row.text for row in rows])
    logits = out_of_fold(rows, data)
    np.save(work / "local_logits.npy", logits)
    return export.arrays(fit(rows, data, HEADS), calibrations(rows, logits))


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
