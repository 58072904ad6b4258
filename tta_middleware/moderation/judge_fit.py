"""From labelled answers to a judging model's calibration: its probe, what its words count, and its step to a score.

Which states the probe reads, and after which layers, is chosen by how well they tell harm where the source was not
seen, too. What the step is fitted on was said by probes that had not seen the answer's source (with fewer than three
sources: the answer's question), so a score is what it would be on answers from elsewhere. Numpy alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tta_middleware.defaults import JUDGE_FALSE_ALARMS
from tta_middleware.errors import ConfigurationError
from tta_middleware.moderation.judge_figures import auc, calibration_error, found_at, threshold_at
from tta_middleware.moderation.judge_probe import RIDGE, JudgeProbe, Read, evened, fit_probe, logistic
from tta_middleware.moderation.llm_judge import JudgeCalibration
from tta_middleware.types import FloatMatrix

FOLDS = 8
LEAST = 8
"""Answers of either kind that a step takes."""
LEAST_FOR_PROBE = 100
"""Answers of either kind that a probe takes: with fewer it learns their wording."""
WORTH_ASKING = 0.005
"""Of AUC, what words have to add to a probe: they are asked for in a pass of their own."""
POOR = 0.7
"""Below this AUC a model is no judge."""

Column = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class JudgedAnswers:
    """What a model said of n labelled answers.

    Attributes:
        words: (n,) log-odds of yes against no in nats.
        states: by place and layers (n, d) states that a probe may read; None where no probe is wanted.
        harmful: what people say of them.
        sources: where each is from; texts of one question belong together where there is but one source.
        questions: what each answers.
    """

    words: Column
    states: Mapping[Read, FloatMatrix] | None
    harmful: NDArray[np.bool_]
    sources: tuple[str, ...]
    questions: tuple[str, ...]

    @property
    def of_each(self) -> int:
        """The number of answers of the rarer kind."""
        return int(min(self.harmful.sum(), (~self.harmful).sum()))


@dataclass(frozen=True, slots=True, eq=False)
class JudgeFit:
    """A calibration and what it is worth on answers that it was not fitted on.

    Attributes:
        scores: (n,) of the answers, each by a probe that had not seen its source or question.
        figures: of these scores; ``prior`` is the share of harmful texts at which a score is a probability.
    """

    calibration: JudgeCalibration
    scores: Column
    figures: dict[str, float]


def fit_judge(answers: JudgedAnswers, *, false_alarms: float = JUDGE_FALSE_ALARMS, ridge: float = RIDGE) -> JudgeFit:
    """The calibration at whose score of 0.5 ``false_alarms`` of the mean source's harmless answers are flagged.

    A probe is part of it where there are states and at least :data:`LEAST_FOR_PROBE` answers of either kind.

    Raises:
        ConfigurationError: fewer than :data:`LEAST` answers of either kind, or the model cannot judge at all.
    """
    if answers.of_each < LEAST:
        raise ConfigurationError(f"a judge is fitted on at least {LEAST} harmful and {LEAST} harmless answers")
    read, probed = _probed(answers, ridge)
    if probed is None:
        [scale], bias = _step([answers.words], answers)
        log_odds, probe, counted = answers.words, None, 0.0
    else:
        (scale, words), bias = _step([probed, answers.words], answers)
        counted = words / scale
        gained = auc(probed + counted * answers.words, answers.harmful) - auc(probed, answers.harmful)
        if counted and gained < WORTH_ASKING:
            counted = 0.0
            [scale], bias = _step([probed], answers)
        log_odds, probe = probed + counted * answers.words, _probe(answers, read, np.ones_like(answers.harmful), ridge)
    if scale <= 0.0:
        raise ConfigurationError(
            "this model's yes and no say nothing of harm on these answers (higher for the harmless ones), so nothing "
            "can be fitted; take another model as judge, or bring answers enough for a probe "
            f"({LEAST_FOR_PROBE} of either kind)"
        )
    centre = threshold_at(log_odds, answers.harmful, false_alarms, by_source(answers))
    calibration = JudgeCalibration(centre=_rounded(centre), scale=_rounded(scale), probe=probe, words=_rounded(counted))
    scores = np.array([calibration.probability(one) for one in log_odds])
    # Moving the centre from where evens are fitted to `centre` is to say that harm is rarer than that.
    prior = 1.0 / (1.0 + math.exp(min(700.0, max(-700.0, scale * centre + bias))))
    return JudgeFit(calibration, scores, _figures(scores, answers, prior))


def folds(answers: JudgedAnswers) -> NDArray[np.int64]:
    """(n,) which fold each answer is in: sources stay whole, or questions where there are under three sources."""
    names = answers.sources if len(set(answers.sources)) >= 3 else answers.questions
    sizes = {name: names.count(name) for name in set(names)}
    filled = [0] * min(FOLDS, len(sizes))
    place: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        place[name] = filled.index(min(filled))
        filled[place[name]] += sizes[name]
    return np.array([place[name] for name in names])


def _probed(answers: JudgedAnswers, ridge: float) -> tuple[Read, Column | None]:
    """What is read, and (n,) log-odds by probes of it that had not seen the answer's source.

    None of these where they are no use, or there are none.
    """
    if answers.states is None or answers.of_each < LEAST_FOR_PROBE:
        return ("verdict", ()), None
    fold, found = folds(answers), np.zeros(len(answers.harmful))
    read = _best_read(answers.states, answers, fold, ridge)
    for at in range(int(fold.max()) + 1):
        found[fold == at] = _probe(answers, read, fold != at, ridge).log_odds(answers.states[read][fold == at])
    return read, found if auc(found, answers.harmful) > 0.5 else None


def _best_read(
    states: Mapping[Read, FloatMatrix], answers: JudgedAnswers, fold: NDArray[np.int64], ridge: float
) -> Read:
    """Where the states tell harm best in folds that were not seen; by least squares, which need no steps."""
    if len(states) == 1:
        return next(iter(states))
    worth = {read: auc(_by_squares(known, answers, fold, ridge), answers.harmful) for read, known in states.items()}
    return max(worth, key=worth.__getitem__)


def _by_squares(states: FloatMatrix, answers: JudgedAnswers, fold: NDArray[np.int64], ridge: float) -> Column:
    """(n,) a linear map's values, fitted by least squares with a ridge on the other folds."""
    truth = answers.harmful.astype(np.float64)
    shares = evened(truth, answers.sources)
    columns = np.column_stack([(states - states.mean(axis=0)) / (states.std(axis=0) + 1e-3), np.ones(len(truth))])
    # A logistic regression's curvature is a quarter of this at most, so the same ridge holds weights as near 0.
    penalty = np.full(columns.shape[1], 4.0 * ridge * len(truth) / 1_000)
    penalty[-1] = 0.0
    products = (columns * shares[:, None]).T @ columns
    sums = columns.T @ (shares * (2.0 * truth - 1.0))
    found = np.zeros(len(truth))
    for at in range(int(fold.max()) + 1):
        here = fold == at
        mine, weighted = columns[here], columns[here] * shares[here, None]
        weights = np.linalg.solve(
            products - weighted.T @ mine + np.diag(penalty), sums - weighted.T @ (2.0 * truth[here] - 1.0)
        )
        found[here] = mine @ weights
    return found


def _probe(answers: JudgedAnswers, read: Read, rows: NDArray[np.bool_], ridge: float) -> JudgeProbe:
    if answers.states is None:
        raise ConfigurationError("a probe is fitted on states")
    sources = [name for name, taken in zip(answers.sources, rows, strict=True) if taken]
    found = fit_probe(answers.states[read][rows], answers.harmful[rows].tolist(), groups=sources, ridge=ridge)
    return replace(found, place=read[0], layers=read[1])


def _step(columns: Sequence[Column], answers: JudgedAnswers) -> tuple[list[float], float]:
    """What each column counts, and the bias, for evens of both kinds.

    The first counts alone where the second says the same or speaks against itself: one of both is negative then.
    """
    truth = answers.harmful.astype(np.float64)
    known = np.column_stack(columns)
    spread = known.std(axis=0) + 1e-9
    shares = evened(truth, answers.sources)
    found = logistic(np.column_stack([known / spread, np.ones(len(truth))]), truth, shares, 1e-3)
    if len(columns) > 1 and min(found[:2]) < 0.0:
        [first], bias = _step(columns[:1], answers)
        return [first, 0.0], bias
    return (found[:-1] / spread).tolist(), float(found[-1])


def by_source(answers: JudgedAnswers) -> Column:
    """(n,) weights by which every source counts the same among the harmless answers, and among the harmful ones.

    A score's 0.5 lies where so many false alarms are raised on the mean source, since the largest one is seldom what a
    judge meets in use: refusals, of which labelled answers are full, are flagged the least.
    """
    pairs = list(zip(answers.sources, answers.harmful.tolist(), strict=True))
    sizes = Counter(pairs)
    return np.array([1.0 / sizes[pair] for pair in pairs])


def _figures(scores: Column, answers: JudgedAnswers, prior: float) -> dict[str, float]:
    """Weights bring the answers to the mixture that the scores are meant for."""
    harmful, evens = answers.harmful, by_source(answers)
    share = float(harmful.mean())
    weights = np.where(harmful, prior / share, (1.0 - prior) / (1.0 - share))
    found = {
        "answers": float(len(scores)),
        "harmful": float(harmful.sum()),
        "auc": auc(scores, harmful),
        "found": float((scores[harmful] >= 0.5).mean()),
        "false_alarms": float(np.average(scores[~harmful] >= 0.5, weights=evens[~harmful])),
        "found_at_5": found_at(scores, harmful, 0.05),
        "prior": prior,
        "calibration_error": calibration_error(scores, harmful, weights),
    }
    return {name: round(value, 4) for name, value in found.items()}


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
