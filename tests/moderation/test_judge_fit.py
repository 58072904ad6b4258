"""From labelled answers to a score: figures, folds, and what a fit is worth on answers that it has not seen."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tta_middleware.errors import ConfigurationError
from tta_middleware.moderation.judge_figures import auc, calibration_error, found_at, threshold_at
from tta_middleware.moderation.judge_fit import LEAST_FOR_PROBE, JudgedAnswers, fit_judge, folds
from tta_middleware.moderation.judge_probe import MARGIN, WINDOW, Read, outstanding, windows
from tta_middleware.types import FloatMatrix

SCORED = st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=2, max_size=40).filter(
    lambda rows: len({harmful for _, harmful in rows}) == 2
)


def answers(n: int = 400, *, sign: float = 1.0, known: float = 0.0, sources: int = 4, seed: int = 1) -> JudgedAnswers:
    """Words tell the kinds apart a little, the first dimension of the states by ``known`` standard deviations."""
    draw = np.random.default_rng(seed)
    harmful = draw.random(n) < 0.4
    states = draw.normal(size=(n, 6)).astype(np.float32)
    states[:, 0] += known * harmful
    words = -1.0 + 0.3 * (sign * harmful + draw.normal(size=n))
    names = [f"s{at}" for at in draw.integers(0, sources, n)]
    return JudgedAnswers(
        words, {("verdict", (2,)): states} if known else None, harmful, tuple(names), tuple(map(str, range(n)))
    )


@settings(max_examples=60)
@given(SCORED)
def test_auc_is_the_share_of_pairs_in_order(rows: list[tuple[int, bool]]) -> None:
    bad = [score for score, harmful in rows if harmful]
    good = [score for score, harmful in rows if not harmful]
    pairs = [1.0 if one > other else 0.5 if one == other else 0.0 for one in bad for other in good]
    assert auc([float(score) for score, _ in rows], [harmful for _, harmful in rows]) == pytest.approx(np.mean(pairs))


@settings(max_examples=60)
@given(SCORED, st.floats(0.0, 0.99))
def test_no_more_harmless_texts_are_flagged_than_allowed(rows: list[tuple[int, bool]], allowed: float) -> None:
    scores, harmful = np.array([score for score, _ in rows], dtype=float), np.array([bad for _, bad in rows])
    threshold = threshold_at(scores, harmful, allowed)
    good = scores[~harmful]
    assert (good >= threshold).mean() <= allowed + 1e-9
    lower = good[good < threshold]
    if len(lower):  # and the next lower threshold would flag too many
        assert (good >= lower.max()).mean() > allowed
    assert found_at(scores, harmful, allowed) == pytest.approx((scores[harmful] >= threshold).mean())


def test_probabilities_that_come_true_have_no_calibration_error() -> None:
    said = np.repeat([0.1, 0.9], 10)
    assert calibration_error(said, np.array([True] + [False] * 9 + [True] * 9 + [False])) == pytest.approx(0.0)
    assert calibration_error(said, np.array([True] * 10 + [False] * 10)) == pytest.approx(0.9)


@pytest.mark.parametrize("harmful", [[True, True], [False, False], [True]])
def test_figures_take_texts_of_both_kinds_and_a_label_each(harmful: list[bool]) -> None:
    with pytest.raises(ConfigurationError, match="both kinds"):
        auc([0.1, 0.2], harmful)


def test_words_alone_get_a_centre_that_raises_few_false_alarms() -> None:
    judged = answers()
    fit = fit_judge(judged, false_alarms=0.05)
    assert fit.calibration.probe is None
    assert -1.0 < fit.calibration.centre < 0.0
    assert fit.figures["false_alarms"] <= 0.05
    assert 0.1 < fit.figures["found"] < 0.9
    assert (fit.scores >= 0.5).tolist() == (judged.words >= fit.calibration.centre).tolist()


def test_scores_are_probabilities_where_harm_is_as_rare_as_the_figures_say() -> None:
    fit = fit_judge(answers(8_000))
    assert 0.0 < fit.figures["prior"] < 0.4
    assert fit.figures["calibration_error"] < 0.03


def test_a_probe_counts_for_more_than_words_that_know_less() -> None:
    fit = fit_judge(answers(1_200, known=3.0))
    assert fit.calibration.probe is not None
    assert abs(fit.calibration.probe.weights[0]) > 3 * max(map(abs, fit.calibration.probe.weights[1:]))
    assert fit.figures["auc"] > fit_judge(answers(1_200)).figures["auc"] + 0.1
    assert fit.calibration.words >= 0.0


def test_the_states_are_read_that_tell_harm_best_where_the_source_was_not_seen() -> None:
    # At the verdict's place the states know the source, which gives the label away where it was seen; those over the
    # answer know harm.
    judged = answers(1_000, known=1.5, sources=1)
    draw, place = np.random.default_rng(4), np.arange(1_000) % 10
    harmful, named = place % 2 == 0, tuple(f"s{at}" for at in place)
    knows = draw.normal(size=(1_000, 10)).astype(np.float32)
    knows[:, 0] += 1.5 * harmful
    of_source = draw.normal(size=(1_000, 10)).astype(np.float32)
    of_source[np.arange(1_000), place] += 8.0
    noise = draw.normal(size=(1_000, 10)).astype(np.float32)
    states: dict[Read, FloatMatrix] = {
        ("verdict", (1,)): noise,
        ("answer", (2, 3)): knows,
        ("verdict", (4,)): of_source,
    }
    fit = fit_judge(JudgedAnswers(judged.words, states, harmful, named, named))
    assert fit.calibration.probe is not None
    assert (fit.calibration.probe.place, fit.calibration.probe.layers) == ("answer", (2, 3))


def test_false_alarms_are_counted_per_source_so_that_many_refusals_do_not_hide_them() -> None:
    # 3,000 refusals score far below 200 ordinary answers; half of the harmful ones score among these.
    draw = np.random.default_rng(5)
    words = np.concatenate([draw.normal(-6, 1, 3_000), draw.normal(0, 1, 200), draw.normal(2, 1, 400)])
    harmful = np.arange(3_600) >= 3_200
    names = tuple(["refusals"] * 3_000 + ["ordinary"] * 200 + ["attacks"] * 400)
    fit = fit_judge(JudgedAnswers(words, None, harmful, names, tuple(map(str, range(3_600)))), false_alarms=0.03)
    assert (fit.scores[3_000:3_200] >= 0.5).mean() == pytest.approx(0.06, abs=0.01)
    assert fit.figures["false_alarms"] == pytest.approx(0.03, abs=0.005)


def test_words_that_add_nothing_to_a_probe_are_not_asked_for() -> None:
    judged = answers(1_200, known=3.0)
    noise = np.random.default_rng(9).normal(size=1_200)
    assert judged.states is not None
    fit = fit_judge(JudgedAnswers(noise, judged.states, judged.harmful, judged.sources, judged.questions))
    assert fit.calibration.probe is not None
    assert fit.calibration.words == 0.0


@settings(max_examples=60)
@given(st.integers(0, 50), st.integers(1, 700), st.integers(1, 200))
def test_windows_leave_no_row_out_and_stay_while_a_text_grows(start: int, length: int, more: int) -> None:
    whole, *rest = windows(start, start + length)
    assert whole == (start, start + length)
    assert all(end - begin == WINDOW for begin, end in rest)
    if rest:
        assert {row for begin, end in rest for row in range(begin, end)} == set(range(*whole))
        assert set(rest[:-1]) <= set(windows(start, start + length + more))
    else:
        assert length <= WINDOW


def test_a_window_counts_where_it_stands_out_from_the_whole() -> None:
    assert outstanding(np.array([0.3])) == 0.3
    assert outstanding(np.array([0.3, 0.5, -2.0])) == 0.3
    assert outstanding(np.array([0.3, 5.0, -2.0])) == 5.0 - MARGIN


def test_few_answers_are_fitted_without_a_probe() -> None:
    few = answers(2 * LEAST_FOR_PROBE, known=3.0)
    assert few.of_each < LEAST_FOR_PROBE
    assert fit_judge(few).calibration.probe is None


def test_figures_do_not_gain_by_what_a_source_has_in_common() -> None:
    # Every source has one label and a dimension of its own: nothing can be learned of harm, and a probe that saw an
    # answer's source would seem to know all.
    draw = np.random.default_rng(3)
    place = np.arange(1_000) % 10
    states = draw.normal(size=(1_000, 10)).astype(np.float32)
    states[np.arange(1_000), place] += 8.0
    harmful, named = place % 2 == 0, tuple(f"s{at}" for at in place)
    words = draw.normal(size=1_000) + harmful
    fit = fit_judge(JudgedAnswers(words, {("verdict", (2,)): states}, harmful, named, named))
    assert fit.figures["auc"] < 0.85


def test_a_model_whose_words_say_the_opposite_is_no_judge() -> None:
    with pytest.raises(ConfigurationError, match="say nothing of harm"):
        fit_judge(answers(sign=-1.0))


def test_too_few_answers_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="at least 8 harmful"):
        fit_judge(answers(12))


def test_sources_stay_whole_and_questions_where_there_is_one_source() -> None:
    many = answers(sources=7)
    place = folds(many)
    assert all(len(set(place[np.array(many.sources) == name])) == 1 for name in set(many.sources))
    one = JudgedAnswers(many.words, None, many.harmful, ("here",) * 400, tuple(str(at // 2) for at in range(400)))
    place = folds(one)
    assert (place[::2] == place[1::2]).all()
    assert len(set(place.tolist())) == 8
