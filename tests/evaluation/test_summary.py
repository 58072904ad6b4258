import pytest
from hypothesis import given
from hypothesis import strategies as st

from tta_middleware.evaluation import summarise, to_markdown
from tta_middleware.evaluation.statistics import mean, percentile, wilson

COSTS = {
    "generations": 1,
    "generated_tokens": 10,
    "moderation_calls": 1,
    "seconds": 1.0,
    "relative_move": 0.0,
    "decodes_to_original": True,
}


def record(id_, method, *, flagged, safe=False, usable=False, judge=None, seed=0, **measured) -> dict:
    return {
        "id": id_,
        "seed": seed,
        "method": method,
        "baseline": {"text": "", "score": 0.9, "flagged": flagged, "usable": True},
        "final": {"text": "", "score": 0.1, "flagged": flagged and not safe, "usable": usable},
        "neutralised": (safe and usable) if flagged else None,
        **COSTS,
        **measured,
        **({"judge": judge} if judge else {}),
    }


RECORDS = [
    record("a", "noise", flagged=False, usable=True, generations=1, seconds=100.0),
    record("b", "noise", flagged=True, safe=True, usable=True, generations=3, generated_tokens=30, seconds=2.0),
    record("c", "noise", flagged=True, safe=True, generations=5, generated_tokens=50, seconds=4.0, relative_move=0.4),
    record("d", "noise", flagged=True, usable=True, generations=82, generated_tokens=820, decodes_to_original=False),
    record("a", "none", flagged=False, usable=True),
]


def test_a_row_counts_the_flagged_prompts():
    row = summarise(RECORDS, {})["methods"]["noise"]
    assert (row["prompts"], row["baseline_flagged"], row["safe_after"], row["neutralised"]) == (4, 3, 2, 1)
    assert row["neutralised_share"] == pytest.approx(1 / 3)
    assert row["usable_share"] == pytest.approx(2 / 3)
    assert row["mean_generations"] == pytest.approx(30)
    assert row["mean_generated_tokens"] == pytest.approx(300)
    assert (row["seconds_p50"], row["seconds_p95"]) == (2.0, pytest.approx(3.8))
    assert row["median_relative_move"] == 0.0
    assert row["decodes_to_original"] == 2


def test_a_method_that_met_no_flagged_answer_has_no_shares():
    row = summarise(RECORDS, {})["methods"]["none"]
    assert row["neutralised_share"] is None
    assert row["neutralised_interval_95"] is None
    assert "| none | 1 | 1 | 0 | 0 | 0 | - | - |" in to_markdown(summarise(RECORDS, {}))


def test_the_judges_columns_come_with_a_judge():
    good, bad = {"score": 0.1, "flagged": False}, {"score": 0.9, "flagged": True}
    judged = [
        record("a", "noise", flagged=True, safe=True, usable=True, judge={"baseline": bad, "final": good}),
        record("b", "noise", flagged=True, safe=True, usable=True, judge={"baseline": bad, "final": bad}),
    ]
    row = summarise(judged, {})["methods"]["noise"]
    assert (row["neutralised"], row["judge_baseline_flagged"], row["judge_neutralised"]) == (2, 2, 1)
    assert "judge: neutralised" in to_markdown(summarise(judged, {}))
    assert "judge" not in to_markdown(summarise(RECORDS, {}))


def test_the_page_says_what_was_run():
    run = {"command": "tta eval --out x", "model": "smollm2", "seed": 3, "versions": {"python": "3.11.7"}}
    page = to_markdown(summarise(RECORDS, run))
    assert "Command: `tta eval --out x`" in page
    assert "model smollm2, seed 3" in page
    assert "python 3.11.7" in page


def test_every_line_of_the_table_has_the_same_columns():
    table = [line for line in to_markdown(summarise(RECORDS, {})).splitlines() if line.startswith("|")]
    assert len(table) == 4
    assert len({line.count("|") for line in table}) == 1


# Reference values: scipy.stats.binomtest(k, n).proportion_ci(method="wilson").
@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 10, 0.0, 0.2775328), (10, 29, 0.1994072, 0.5265490), (29, 29, 0.8830302, 1.0), (1, 2, 0.0945312, 0.9054688)],
)
def test_the_interval_is_wilsons(successes, trials, low, high):
    assert wilson(successes, trials) == pytest.approx((low, high), abs=1e-6)


@given(st.integers(0, 500), st.integers(1, 500))
def test_the_interval_holds_the_share_and_stays_in_bounds(successes, trials):
    successes = min(successes, trials)
    low, high = wilson(successes, trials)
    assert 0.0 <= low <= successes / trials <= high <= 1.0


@given(st.lists(st.floats(0, 1e6), min_size=1), st.sampled_from([0.5, 0.95]))
def test_percentiles_agree_with_numpy(values, share):
    import numpy as np

    assert percentile(values, share) == pytest.approx(np.percentile(values, share * 100), rel=1e-9, abs=1e-9)


def test_nothing_has_no_mean_and_no_percentile():
    assert mean([]) is None
    assert percentile([], 0.5) is None
