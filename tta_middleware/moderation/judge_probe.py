"""A linear probe on a judging model's hidden states: what it knows of a text, where its yes and no do not say so.

Fitted on texts with labels, by logistic regression with a ridge, with numpy alone; a model of 900 dimensions and some
thousands of texts take seconds. A probe belongs to one model and one wording of the question.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tta_middleware.errors import ConfigurationError
from tta_middleware.types import FloatMatrix

Place: TypeAlias = Literal["verdict", "answer"]
Read: TypeAlias = tuple[Place, tuple[int, ...]]
"""Where, and after which layers."""

WINDOW, STRIDE = 96, 48
"""Tokens of an answer that are read together beside the whole, and from one such window's beginning to the next's."""

MARGIN = 1.0
"""Nats that a window has to say more than the whole would: of many windows some one is always a little higher."""

RIDGE = 250.0
"""How strongly a probe's weights are held near 0; see docs/decisions/027."""

_STEPS = 25
_CLOSE = 1e-4
_LEAST_OF_EACH = 8


@dataclass(frozen=True, slots=True)
class JudgeProbe:
    """Log-odds of harm by a hidden state: ``weights @ state + bias``.

    Attributes:
        layers: after which the states are taken that it reads side by side, counted from 1; empty: after the last.
        place: where they are taken: at the place of the verdict; or over the answer, the mean of what the layers'
            attention keeps of it as values.

    Raises:
        ConfigurationError: there are no weights, or a number is not finite.
    """

    weights: tuple[float, ...]
    bias: float
    layers: tuple[int, ...] = ()
    place: Place = "verdict"

    def __post_init__(self) -> None:
        if not self.weights or not all(map(math.isfinite, (*self.weights, self.bias))):
            raise ConfigurationError("a probe has finite weights, one per dimension of the model's hidden state")

    @property
    def reads_windows(self) -> bool:
        """Whether it reads a long text window by window, so that nobody need ask about its stretches one by one."""
        return self.place == "answer"

    def log_odds(self, states: FloatMatrix) -> NDArray[np.float64]:
        """(n,) log-odds in nats for (n, d) states.

        Raises:
            ConfigurationError: the states are not as wide as the probe, which is another model's then.
        """
        if states.ndim != 2 or states.shape[1] != len(self.weights):
            raise ConfigurationError(
                f"the probe has {len(self.weights)} weights and the model's states {states.shape[-1]} dimensions; "
                "fit a probe for this model"
            )
        found: NDArray[np.float64] = states.astype(np.float64) @ np.array(self.weights) + self.bias
        return found


def windows(start: int, end: int) -> list[tuple[int, int]]:
    """Spans of an answer that fills the rows from ``start`` to before ``end``: the whole, and of a long one windows.

    Windows begin at multiples of :data:`STRIDE`, so those of a text that grows stay what they were, but for the last.
    """
    longer = end - start > WINDOW
    begins = range(start, end - WINDOW, STRIDE) if longer else ()
    return [(start, end), *((at, at + WINDOW) for at in begins), *([(end - WINDOW, end)] if longer else ())]


def outstanding(log_odds: NDArray[np.float64]) -> float:
    """Of the log-odds of :func:`windows`, the whole's, or the highest window's less :data:`MARGIN` if that is more.

    So harm in a long harmless text does not drown, and a window that was flagged keeps its say while the text grows.
    """
    return float(max([log_odds[0], *(log_odds[1:] - MARGIN)]))


def fit_probe(
    states: FloatMatrix, harmful: Sequence[bool], *, groups: Sequence[str] | None = None, ridge: float = RIDGE
) -> JudgeProbe:
    """The probe that tells harmful from harmless states best, for evens of both.

    Args:
        states: (n, d) hidden states of a judging model at the verdict's place.
        harmful: what people say of the n texts.
        groups: where each text is from; no group counts for more than 100 of its texts of one label, so that a large
            source does not drown the others.
        ridge: how strongly weights are held near 0, per thousand texts, in units of one standard deviation.

    Raises:
        ConfigurationError: too few texts of either kind, or the numbers of states, labels and groups differ.
    """
    truth = np.array(harmful, dtype=np.float64)
    if states.ndim != 2 or len(states) != len(truth) or (groups is not None and len(groups) != len(truth)):
        raise ConfigurationError("a probe is fitted on one state, one label and one group per text")
    if min(truth.sum(), len(truth) - truth.sum()) < _LEAST_OF_EACH:
        raise ConfigurationError(f"a probe takes at least {_LEAST_OF_EACH} harmful and {_LEAST_OF_EACH} harmless texts")
    known = states.astype(np.float64)
    mean, spread = known.mean(axis=0), known.std(axis=0) + 1e-3
    columns = np.column_stack([(known - mean) / spread, np.ones(len(known))])
    found = logistic(columns, truth, evened(truth, groups), ridge * len(known) / 1_000)
    weights = found[:-1] / spread
    return JudgeProbe(tuple(weights.tolist()), float(found[-1] - weights @ mean))


def evened(truth: NDArray[np.float64], groups: Sequence[str] | None, most: int = 100) -> NDArray[np.float64]:
    """How much each text counts: sources bounded, both labels even, 1 on average."""
    shares = np.ones(len(truth))
    names = np.array(groups if groups is not None else [""] * len(truth))
    if groups is not None:
        for name in set(groups):
            for label in (0.0, 1.0):
                here = (names == name) & (truth == label)
                shares[here] = min(1.0, most / max(1, here.sum()))
    shares[truth == 1.0] *= shares[truth == 0.0].sum() / shares[truth == 1.0].sum()
    scaled: NDArray[np.float64] = shares / shares.mean()
    return scaled


def logistic(
    columns: NDArray[np.float64], truth: NDArray[np.float64], shares: NDArray[np.float64], ridge: float
) -> NDArray[np.float64]:
    """Weights of a logistic regression and, last, the bias, whose column of ones the ridge leaves free.

    Args:
        columns: (n, d) of about one standard deviation each; the last is all ones.
        truth: (n,) zeros and ones.
        shares: (n,) how much each row counts.
        ridge: how strongly weights are held near 0.
    """
    penalty = np.full(columns.shape[1], ridge)
    penalty[-1] = 0.0
    weights = np.zeros(columns.shape[1])
    for _ in range(_STEPS):
        chance = 1.0 / (1.0 + np.exp(-np.clip(columns @ weights, -30.0, 30.0)))
        curvature = (columns * (chance * (1.0 - chance) * shares + 1e-6)[:, None]).T @ columns + np.diag(penalty)
        slope = columns.T @ ((chance - truth) * shares) + penalty * weights
        step = np.linalg.solve(curvature, slope)
        weights = weights - step
        if float(np.abs(step).max()) < _CLOSE:
            break
    return weights
