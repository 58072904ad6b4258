"""Fits linear heads on rows with soft, partly missing targets.

First come base models of toxicity: Perspective's attributes (ridge regression on their logits). Every head is then a
logistic regression on the n-grams and the base models' outputs together. A linear model of linear models is linear
again, so one column of weights a head is all that remains.

``harm`` is the mean of two such models. Most sources hold harmful answers only, or harmless ones only, and their style
gives the label away. One model sees the sources as they are: it learns that ordinary prose is harmless. The other has
a free constant for every source, which takes that difference up: it learns what tells answers of one source apart.
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
ITERATIONS = 100
SOURCE_CONSTANTS = (0.0, 1.0)
"""How free the constant of a source is, in each of the two models of harm."""

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
    fitted = [_harm(rows, joined) if head == "harm" else _head(rows, joined, head) for head in heads]
    weights = np.stack([column[: len(base)] + base @ column[len(base) :] for column, _ in fitted], axis=1)
    bias = np.array([constant + float(offset @ column[len(base) :]) for column, constant in fitted])
    return Linear(tuple(heads), weights, bias, word_idf, char_idf)


def _moments(values: NDArray[np.float64]) -> tuple[Vector, Vector]:
    return values.mean(axis=0), values.std(axis=0)


def _base(rows: Sequence[Row], features: sp.csr_matrix) -> tuple[NDArray[np.float64], Vector]:
    """(features, base models) weights and their offsets."""
    models = [_attribute(rows, features, name) for name in ATTRIBUTES]
    return np.stack([column for column, _ in models], axis=1), np.array([constant for _, constant in models])


def _attribute(rows: Sequence[Row], features: sp.csr_matrix, name: str) -> tuple[Vector, float]:
    known = [i for i, row in enumerate(rows) if row.source == "perspective" and name in row.extra["scores"]]
    share = np.clip([rows[i].extra["scores"][name] for i in known], 0.01, 0.99)
    model = Ridge(alpha=1.0, solver="lsqr").fit(features[known], np.log(share / (1 - share)))
    return model.coef_, float(model.intercept_)


def _harm(rows: Sequence[Row], features: sp.csr_matrix) -> tuple[Vector, float]:
    known = [i for i, row in enumerate(rows) if "harm" in row.targets]
    targets = np.array([rows[i].targets["harm"] for i in known])
    weight = source_weights([rows[i] for i in known], targets)
    sources, place = np.unique([rows[i].source for i in known], return_inverse=True)
    fitted = []
    for freedom in SOURCE_CONSTANTS:
        constants = sp.csr_matrix((np.full(len(known), freedom, np.float32), (np.arange(len(known)), place)))
        column, constant = _soft(sp.hstack([features[known], constants], format="csr"), targets, weight)
        fitted.append((column[: -len(sources)], constant))
    return np.mean([column for column, _ in fitted], axis=0), float(np.mean([constant for _, constant in fitted]))


def source_weights(rows: Sequence[Row], targets: Vector) -> Vector:
    """A source counts by the root of its rows; in it, and over all, both classes weigh the same."""
    sources = np.array([row.source for row in rows])
    weight = np.empty(len(rows))
    for source in np.unique(sources):
        mine = sources == source
        own = np.array([row.weight for row, of in zip(rows, mine, strict=True) if of])
        weight[mine] = _even(own, targets[mine]) * own.mean() * mine.sum() ** 0.5
    return _even(weight, targets) * len(rows)


def _even(weight: Vector, targets: Vector) -> Vector:
    """Weights that sum to one, half of it for each class where there are both."""
    positive, negative = float((weight * targets).sum()), float((weight * (1 - targets)).sum())
    if not positive or not negative:
        return weight / weight.sum()
    return np.asarray(weight * (targets / (2 * positive) + (1 - targets) / (2 * negative)))


def _head(rows: Sequence[Row], features: sp.csr_matrix, head: str) -> tuple[Vector, float]:
    known = [i for i, row in enumerate(rows) if head in row.targets]
    targets = np.array([rows[i].targets[head] for i in known])
    return _soft(features[known], targets, _weights([rows[i] for i in known], targets))


def _soft(features: sp.csr_matrix, targets: Vector, weight: Vector) -> tuple[Vector, float]:
    # A soft target is a positive and a negative copy of the row that share its weight.
    copies = sp.vstack([features, features], format="csr")
    labels = np.repeat([1, 0], len(targets))
    share = np.concatenate([weight * targets, weight * (1 - targets)])
    used = share > 0
    return _logistic(copies[used], labels[used], share[used])


def _logistic(features: sp.csr_matrix, labels: NDArray[np.int64], weight: Vector) -> tuple[Vector, float]:
    model = LogisticRegression(C=STRENGTH, max_iter=ITERATIONS, tol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features, labels, sample_weight=weight)
    return model.coef_[0], float(model.intercept_[0])


def _weights(rows: Sequence[Row], targets: Vector) -> Vector:
    """Rows of crowded groups count less, and both classes weigh the same in all."""
    hard = (targets >= 0.5).tolist()
    crowd = Counter((row.group, label) for row, label in zip(rows, hard, strict=True))
    weight = np.array([row.weight / crowd[row.group, label] ** CROWD for row, label in zip(rows, hard, strict=True)])
    return _even(weight, targets) * len(rows)
