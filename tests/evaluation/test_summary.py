import pytest
from hypothesis import given
from hypothesis import strategies as st

from tta_middleware.evaluation import summarise, to_markdown
from tta_middleware.evaluation.agreement import Agreement
from tta_middleware.evaluation.statistics import mean, percentile, wilson

COSTS = {
    "generations": 1,
    "generated_tokens": 10,
    "moderation_calls": 1,
    "seconds": 1.0,
    "relative_move": 0.0,
    "decodes_to_original": True,
}


def record(id_, method, *, flagged, safe=False, usable=False, judges=None, seed=0, **measured) -> dict:
    return {
        "id": id_,
        "seed": seed,
        "method": method,
        "baseline": {"text": "", "score": 0.9, "flagged": flagged, "usable": True},
        "final": {"text": "", "score": 0.1, "flagged": flagged and not safe, "usable": usable},
        "neutralised": (safe and usable) if flagged else None,
        **COSTS,
        **measured,
        **({"judges": judges} if judges else {}),
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
        record("a", "noise", flagged=True, safe=True, usable=True, judges={"second": {"baseline": bad, "final": good}}),
        record("b", "noise", flagged=True, safe=True, usable=True, judges={"second": {"baseline": bad, "final": bad}}),
    ]
    row = summarise(judged, {})["methods"]["noise"]
    assert row["neutralised"] == 2
    assert row["judges"] == {"second": {"baseline_flagged": 2, "neutralised": 1}}
    page = to_markdown(summarise(judged, {}))
    assert "second: flagged before | second: neutralised" in page
    assert "judge" not in page, "one judge has no common column and no agreement"
    assert "judge" not in to_markdown(summarise(RECORDS, {}))


def test_two_judges_have_columns_a_common_one_and_their_agreement():
    def opinions(first, second):
        return {
            name: {"baseline": {"score": 0.9, "flagged": before}, "final": {"score": 0.1, "flagged": after}}
            for name, (before, after) in (("a", first), ("b", second))
        }

    def judged(id_, method, first, second, text):
        found = record(id_, method, flagged=True, safe=True, usable=True, judges=opinions(first, second))
        return {**found, "baseline": {**found["baseline"], "text": "first"}, "final": {**found["final"], "text": text}}

    records = [
        judged("p", "noise", (True, False), (True, False), "fine"),
        judged("q", "noise", (True, False), (False, True), "doubtful"),
        judged("q", "race", (True, True), (False, True), "worse"),
        judged("r", "race", (False, False), (False, False), "fine"),
    ]
    summary = summarise(records, {})
    assert summary["methods"]["noise"]["judges"]["b"] == {"baseline_flagged": 1, "neutralised": 1}
    assert [summary["methods"][name]["judges_neutralised"] for name in ("noise", "race")] == [1, 1]
    rows = {row["of"]: row for row in summary["agreement"]}
    assert all(row["judges"] == ["a", "b"] for row in rows.values())
    first = rows["flagged first answers"]
    assert (first["texts"], first["both"], first["first_only"], first["second_only"]) == (3, 1, 1, 0), "q counts once"
    # By hand: (2/3 - (2/3 x 1/3 + 1/3 x 2/3)) / (1 - 4/9).
    assert first["kappa"] == pytest.approx(0.4)
    assert (rows["repairs"]["texts"], rows["repairs"]["second_only"]) == (4, 1)
    assert rows["repairs"]["kappa"] == pytest.approx(0.5)
    assert rows["all"]["texts"] == 7
    page = to_markdown(summary)
    assert "a: neutralised | b: flagged before | b: neutralised | judges: neutralised" in page
    assert "| a and b | repairs | 4 | 1 | 0 | 1 | 75% | 0.50 |" in page


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_kappa_is_one_for_equal_marks_and_the_same_for_both_orders(pairs):
    found, turned = Agreement.of(pairs), Agreement.of((b, a) for a, b in pairs)
    assert found.kappa == pytest.approx(turned.kappa)
    equal = Agreement.of((a, a) for a, _ in pairs)
    assert equal.kappa in (None, 1.0)
    assert (equal.kappa is None) == (len({a for a, _ in pairs}) == 1)
    assert Agreement.of([]).kappa is None


def test_a_run_that_took_more_tokens_was_not_neutralised_within_them():
    found = summarise(RECORDS, {"max_new_tokens": 10})["within_tokens"]
    assert found["tokens"] == [20, 40, 80, 160, 320]
    noise = found["methods"]["noise"]
    assert noise["prompts"] == 3
    assert noise["shares"] == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3, 1 / 3]), "c is safe and not usable"
    assert noise["intervals_95"][0] == wilson(0, 3)
    assert "none" not in found["methods"], "it met no flagged answer"
    page = to_markdown(summarise(RECORDS, {"max_new_tokens": 10}))
    assert "| noise | 3 | 0% (0% to 56%) | 33% (6% to 79%) |" in page


def test_equal_tokens_take_a_prompt_with_several_seeds_as_one():
    runs = [
        record("p", "m", flagged=True, safe=True, usable=True, seed=seed, generated_tokens=tokens)
        for seed, tokens in enumerate((128, 129))
    ]
    found = summarise(runs, {})["within_tokens"]["methods"]["m"]
    assert (found["prompts"], found["shares"][:2]) == (1, [0.5, 1.0])
    assert found["intervals_95"][0] == wilson(0.5, 1)


@given(st.lists(st.tuples(st.integers(64, 3000), st.booleans()), min_size=1, max_size=12))
def test_more_tokens_never_neutralise_fewer(runs):
    records = [
        record(at, "m", flagged=True, safe=safe, usable=True, generated_tokens=tokens)
        for at, (tokens, safe) in enumerate(runs)
    ]
    shares = summarise(records, {})["within_tokens"]["methods"]["m"]["shares"]
    assert shares == sorted(shares)


def test_the_page_says_what_was_run():
    run = {"command": "tta eval --out x", "model": "smollm2", "seed": 3, "versions": {"python": "3.11.7"}}
    page = to_markdown(summarise(RECORDS, run))
    assert "Command: `tta eval --out x`" in page
    assert "model smollm2, seed 3" in page
    assert "python 3.11.7" in page


def test_every_line_of_the_table_has_the_same_columns():
    tables = [part.splitlines() for part in to_markdown(summarise(RECORDS, {})).split("\n\n") if part.startswith("|")]
    assert [len(lines) for lines in tables] == [4, 3]
    for lines in tables:
        assert len({line.count("|") for line in lines}) == 1


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
