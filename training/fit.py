"""Fits linear heads on rows with soft, partly missing targets.

First come base models of toxicity: Perspective's attributes (ridge regression on their logits) and Davidson's two
distinctions (logistic regression). Every head is then a logistic regression on the n-grams and the base models'
outputs together. A linear model of linear models is linear again, so one column of weights a head is all that remains.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge

from training.data import ATTRIBUTES, Row
from training.matrix import Matrices, design, idf

CHAR_MIX = 0.5
STRENGTH = 10.0
BASE_MIX = 0.3
CROWD = 0.5
ITERATIONS = 300

Vector = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """Heads as columns: ``logits = design @ weights + bias``."""

    heads: tuple[str, ...]
    weights: NDArray[np.float64]
    bias: Vector
    word_idf: NDArray[np.uint8]
    char_idf: NDArray[np.uint8]
    char_mix: float = CHAR_MIX

    def logits(self, data: Matrices) -> NDArray[np.float64]:
        """(texts, heads)."""
        return np.asarray(design(data, self.word_idf, self.char_idf, self.char_mix) @ self.weights + self.bias)


def fit(rows: Sequence[Row], data: Matrices, heads: Sequence[str]) -> Linear:
    """One logistic regression a head, on the rows that have a target for it."""
    word_idf, char_idf = idf(data.word), idf(data.char)
    features = design(data, word_idf, char_idf, CHAR_MIX)
    base, offset = _base(rows, features)
    shift, spread = _moments(features @ base + offset)
    # Standardised and mixed in with a weight that leaves the n-grams the larger say.
    base, offset = base * (BASE_MIX / spread), (offset - shift) * (BASE_MIX / spread)
    joined = sp.hstack([features, sp.csr_matrix(features @ base + offset)], format="csr")
    fitted = [_head(rows, joined, head) for head in heads]
    weights = np.stack([column[: len(base)] + base @ column[len(base) :] for column, _ in fitted], axis=1)
    bias = np.array([constant + float(offset @ column[len(base) :]) for column, constant in fitted])
    return Linear(tuple(heads), weights, bias, word_idf, char_idf)


def _moments(values: NDArray[np.float64]) -> tuple[Vector, Vector]:
    return values.mean(axis=0), values.std(axis=0)


def _base(rows: Sequence[Row], features: sp.csr_matrix) -> tuple[NDArray[np.float64], Vector]:
    """(features, base models) weights and their offsets."""
    models = [_attribute(rows, features, name) for name in ATTRIBUTES]
    tweets = [i for i, row in enumerate(rows) if row.source == "davidson"]
    for positive in (("hate",), ("hate", "offensive")):
        label = np.array([rows[i].extra["label"] in positive for i in tweets], dtype=int)
        weight = np.where(label == 1, 1 / label.mean(), 1 / (1 - label.mean()))
        models.append(_logistic(features[tweets], label, weight))
    return np.stack([column for column, _ in models], axis=1), np.array([constant for _, constant in models])


def _attribute(rows: Sequence[Row], features: sp.csr_matrix, name: str) -> tuple[Vector, float]:
    known = [i for i, row in enumerate(rows) if row.source == "perspective" and name in row.extra["scores"]]
    share = np.clip([rows[i].extra["scores"][name] for i in known], 0.01, 0.99)
    model = Ridge(alpha=1.0, solver="lsqr").fit(features[known], np.log(share / (1 - share)))
    return model.coef_, float(model.intercept_)


def _head(rows: Sequence[Row], features: sp.csr_matrix, head: str) -> tuple[Vector, float]:
    known = [i for i, row in enumerate(rows) if head in row.targets]
    targets = np.array([rows[i].targets[head] for i in known])
    weight = _weights([rows[i] for i in known], targets)
    # A soft target is a positive and a negative copy of the row that share its weight.
    copies = sp.vstack([features[known], features[known]], format="csr")
    labels = np.repeat([1, 0], len(known))
    share = np.concatenate([weight * targets, weight * (1 - targets)])
    used = share > 0
    return _logistic(copies[used], labels[used], share[used])


def _logistic(features: sp.csr_matrix, labels: NDArray[np.int64], weight: Vector) -> tuple[Vector, float]:
    model = LogisticRegression(C=STRENGTH, max_iter=ITERATIONS, tol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features, labels, sample_weight=weight)
    return model.coef_[0], float(model.intercept_[0])


def _weights(rows: Sequence[Row], targets: Vector) -> Vector:
    """Rows of crowded groups count less, and both classes weigh the same in all."""
    hard = (targets >= 0.5).tolist()
    crowd = Counter((row.group, label) for row, label in zip(rows, hard, strict=True))
    weight = np.array([row.weight / crowd[row.group, label] ** CROWD for row, label in zip(rows, hard, strict=True)])
    positive = float((weight * targets).sum())
    negative = float(weight.sum()) - positive
    weight = weight * (targets / (2 * positive) + (1 - targets) / (2 * negative))
    return np.asarray(weight * len(rows) / weight.sum())
