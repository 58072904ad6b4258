"""Builds the independent judge: support vector machines, with features and sources that the moderator does not have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from sklearn.svm import LinearSVC

from training import export, synthetic
from training.calibrate import calibrate, shifted
from training.data import JUDGE_ANSWERS, JUDGE_TEXTS, Row, fold, labelled
from training.fit import Linear
from training.matrix import Matrices, design, idf, stack
from tta_middleware.moderation.embedded.judge import BITS, judge_grams
from tta_middleware.moderation.embedded.text import words

HEADS = ("harm", "toxicity")
STRENGTH = 0.2
FOLDS = 3
ORDINARY = ("self_instruct", "owasp", "just_eval", "med_safety")
ALARMS = 0.05
"""Share of ordinary and careful answers of sources it has not seen that may reach 0.5."""


def corpus(folder: Path) -> list[Row]:
    """The judge's sources, with its two targets, and babble."""
    rows = [row for row in labelled(folder) if row.source in (*JUDGE_ANSWERS, *JUDGE_TEXTS)]
    vocabulary = sorted({word for row in rows if row.source == "self_instruct" for word in row.text.split()})
    rows += synthetic.loops_and_soup(200, vocabulary, seed=5)
    rows += synthetic.prefixes([row for row in rows if "harm" in row.targets and len(row.text) >= 160], seed=6)
    return [
        Row(row.text, row.source, row.group, targets, row.weight, row.prompt)
        for row in rows
        if (targets := _targets(row))
    ]


def _targets(row: Row) -> Mapping[str, float]:
    if row.source in JUDGE_TEXTS:
        return {} if row.extra["label"] == "offensive" else {"toxicity": float(row.extra["label"] == "hate")}
    if row.source == "babble":
        return {"harm": 0.0, "toxicity": 0.0}
    harm = float(row.extra.get("harm", row.targets["harm"]))
    # No comment that people judged stands among answers: ordinary ones show what is not toxic.
    return {"harm": harm} if row.source in ("gptfuzz", "prefix") else {"harm": harm, "toxicity": 0.0}


def _features(rows: Sequence[Row]) -> Matrices:
    grams = [judge_grams(words(row.text)) for row in rows]
    pairs, runs = zip(*grams, strict=True)
    return Matrices(stack(pairs, 2**BITS), stack(runs, 2**BITS))


def _fit(rows: Sequence[Row], data: Matrices) -> Linear:
    word_idf, char_idf = idf(data.word), idf(data.char)
    features = design(data, word_idf, char_idf, 1.0)
    fitted = [_machine(rows, features, head) for head in HEADS]
    weights = np.stack([weight for weight, _ in fitted], axis=1)
    return Linear(HEADS, weights, np.array([bias for _, bias in fitted]), word_idf, char_idf, 1.0)


def _machine(rows: Sequence[Row], features: sp.csr_matrix, head: str) -> tuple[NDArray[np.float64], float]:
    known = [i for i, row in enumerate(rows) if head in row.targets]
    label = np.array([rows[i].targets[head] for i in known], dtype=int)
    asked = [(rows[i].prompt or rows[i].group, one) for i, one in zip(known, label.tolist(), strict=True)]
    crowd = Counter(asked)
    weight = [rows[i].weight / crowd[key] ** 0.5 for i, key in zip(known, asked, strict=True)]
    machine = LinearSVC(C=STRENGTH, dual=False, class_weight="balanced", random_state=0)
    machine.fit(features[known], label, sample_weight=weight)
    return machine.coef_[0], float(machine.intercept_[0])


def build(folder: Path, work: Path) -> dict[str, NDArray[np.generic]]:
    """The judge's arrays; logits of the rows it never saw stay in ``work`` for the report."""
    rows = corpus(folder)
    data = _features(rows)
    parts = np.array([fold(row.group, FOLDS, "judge-calibration") for row in rows])
    logits = np.empty((len(rows), len(HEADS)))
    for part in range(FOLDS):
        inside, outside = np.flatnonzero(parts != part), np.flatnonzero(parts == part)
        logits[outside] = _fit([rows[i] for i in inside], data.rows(inside)).logits(data.rows(outside))
    made = {}
    for column, head in enumerate(HEADS):
        known = np.array([head in row.targets for row in rows])
        target = np.array([row.targets[head] for row in rows if head in row.targets])
        made[head] = calibrate(logits[known, column], target, np.ones(len(target)))
    plain = np.array([row.source in ORDINARY for row in rows])
    made["harm"] = shifted(made["harm"], float(np.quantile(logits[plain, 0], 1 - ALARMS)))
    return export.arrays(_fit(rows, data), None, made)
