import math
import sys

import pytest

from tta_middleware.errors import ConfigurationError, MissingExtraError
from tta_middleware.evaluation import summarise
from tta_middleware.evaluation.comparisons import bootstrap_mean, compare


def rows(records, reference):
    return {(row["method"], row["measure"]): row for row in compare(records, reference)}


def test_one_seed_is_mcnemars_exact_test(comparison):
    row = rows(comparison(), "good")["costly", "neutralised"]
    assert (row["pairs"], row["better"], row["worse"], row["difference"]) == (12, 0, 6, -0.5)
    assert row["p"] == pytest.approx(2 * 0.5**6)


def test_tokens_and_relevance_are_compared_prompt_by_prompt(comparison):
    tokens = rows(comparison(), "good")["costly", "generated_tokens"]
    assert tokens["difference"] == pytest.approx(256 + 5.5)
    assert tokens["interval_95"][0] <= tokens["difference"] <= tokens["interval_95"][1]
    assert tokens["p"] == pytest.approx(2 * 0.5**12)
    relevance = rows(comparison(), "good")["costly", "relevance"]
    assert (relevance["pairs"], relevance["difference"]) == (6, pytest.approx(-0.2))
    assert ("none", "relevance") not in rows(comparison(), "good")


def test_seeds_of_one_prompt_are_one_pair(comparison):
    once = comparison()
    thrice = [{**record, "seed": seed} for record in once for seed in range(3)]
    for key, row in rows(thrice, "good").items():
        assert (row["pairs"], row["p"]) == (
            rows(once, "good")[key]["pairs"],
            pytest.approx(rows(once, "good")[key]["p"]),
        )


def test_p_values_are_adjusted_for_their_number(comparison):
    for row in compare(comparison(), "good"):
        assert row["p"] <= row["p_adjusted"] <= 1.0


def test_methods_that_never_differ_are_not_told_apart_and_few_pairs_are_not_tested(staged):
    same = [staged(f"p{at}", name, 0.9, 0.1) for at in range(8) for name in ("a", "b")]
    assert {row["p"] for row in compare(same, "a")} == {1.0}
    few = [staged(f"p{at}", name, 0.9, 0.1, tokens=64 * n) for at in range(3) for n, name in enumerate("ab", start=1)]
    assert rows(few, "a")["b", "generated_tokens"]["p"] is None


def test_a_reference_without_results_is_refused(comparison):
    with pytest.raises(ConfigurationError, match="no results of the reference 'race'; there are none, good, costly"):
        compare(comparison(), "race")


def test_the_bootstrap_interval_of_the_mean_is_that_of_a_large_sample():
    values = [float(at % 10) for at in range(400)]
    low, high = bootstrap_mean(values)
    spread = 1.96 * math.sqrt(8.25 / 400)
    assert (low, high) == (pytest.approx(4.5 - spread, abs=0.03), pytest.approx(4.5 + spread, abs=0.03))
    assert bootstrap_mean([1.0]) is None


def test_without_scipy_the_summary_comes_and_the_tests_say_what_to_install(monkeypatch, comparison):
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert summarise(comparison(), {})["methods"]["good"]["neutralised"] == 12
    with pytest.raises(MissingExtraError, match=r"tta-middleware\[eval\]"):
        summarise(comparison(), {}, reference="good")
