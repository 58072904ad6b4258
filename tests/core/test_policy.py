"""Verdicts seen through a policy."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tta_middleware import CATEGORIES, Policy, Verdict
from tta_middleware.errors import ConfigurationError, InvalidVerdictError
from tta_middleware.policy import StagePolicies

scores = st.dictionaries(st.sampled_from(CATEGORIES), st.floats(0, 1), min_size=1)


def verdict(**values: float) -> Verdict:
    return Verdict({name.replace("_", "-"): score for name, score in values.items()}, flagged=False, model="m")


def test_the_threshold_itself_is_flagged() -> None:
    policy = Policy(threshold=0.5)
    assert policy.decide(verdict(hate=0.5)).flagged
    assert not policy.decide(verdict(hate=0.4999)).flagged


def test_a_category_may_be_stricter_than_the_rest() -> None:
    policy = Policy(threshold=0.5, categories={"self-harm": 0.1})
    decision = policy.decide(verdict(hate=0.3, self_harm=0.2))
    assert decision.flagged
    assert decision.category == "self-harm"


def test_the_moderators_own_opinion_does_not_decide() -> None:
    assert not Policy(threshold=0.5).decide(Verdict({"hate": 0.1}, flagged=True, model="m")).flagged


def test_the_moderators_default_fills_an_open_threshold_only() -> None:
    assert Policy().with_default(0.1).threshold == 0.1
    assert Policy(threshold=0.7).with_default(0.1).threshold == 0.7


def test_a_policy_without_a_threshold_does_not_decide() -> None:
    with pytest.raises(ConfigurationError, match="with_default"):
        Policy().decide(verdict(hate=0.1))


@given(scores, st.floats(0, 1))
def test_flagged_exactly_when_some_score_reaches_the_threshold(values: dict[str, float], threshold: float) -> None:
    decision = Policy(threshold=threshold).decide(Verdict(values, flagged=False, model="m"))
    assert decision.flagged == any(score >= threshold for score in values.values())
    assert decision.flagged == (decision.excess >= 0)


@pytest.mark.parametrize("value", [Policy(threshold=0.2), 0.2, {"hate": 0.2}, None])
def test_what_users_write_becomes_a_policy(value: object) -> None:
    assert isinstance(Policy.of(value), Policy)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (1.5, "less than or equal to 1"),
        (-0.1, "greater than or equal to 0"),
        (math.nan, "finite"),
        ({"self harm": 0.2}, "did you mean 'self-harm'"),
        ({"hate": 7}, "less than or equal to 1"),
        (True, "threshold"),
        ("strict", "threshold"),
    ],
)
def test_mistakes_are_named(value: object, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        Policy.of(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("score", [math.nan, -0.01, 1.01, math.inf, 10**400, -(10**400)])
def test_a_malformed_score_never_becomes_a_verdict(score: float) -> None:
    with pytest.raises(InvalidVerdictError, match="hate"):
        Verdict({"hate": score}, flagged=False, model="m")


def test_no_scores_never_become_a_verdict() -> None:
    with pytest.raises(InvalidVerdictError, match="no category"):
        Verdict({}, flagged=False, model="m")


def test_a_repair_has_to_clear_a_margin_below_the_threshold() -> None:
    stages = StagePolicies.of(Policy(threshold=0.5, categories={"hate": 0.2}))
    close, clear = verdict(violence=0.4, hate=0.01), verdict(violence=0.3, hate=0.13)
    assert not stages.output.decide(close).flagged
    assert stages.repair.decide(close).flagged
    assert not stages.repair.decide(clear).flagged
    assert stages.repair.decide(verdict(hate=0.15)).flagged


def test_a_margin_of_ones_own_holds_for_repairs_too() -> None:
    table = {"threshold": 0.5, "repair": {"margin": 0.9}}
    assert StagePolicies.from_table(table).repair.margin == 0.9
    assert StagePolicies.from_table({"threshold": 0.5, "margin": 0.8}).repair.margin == 0.8
    assert StagePolicies.of(Policy(margin=0.8)).repair.margin == 0.8


def test_thoughts_that_have_a_policy_of_their_own_are_lowered_with_the_answer() -> None:
    stages = StagePolicies.from_table({"threshold": 0.5, "reasoning": {"threshold": 0.9, "shadow": ["hate"]}})
    lowered = stages.lowered(0.3, {"hate": 0.2})
    for stage in ("output", "repair", "reasoning"):
        assert lowered.at(stage).decide(verdict(violence=0.3)).flagged
        assert lowered.at(stage).decide(verdict(hate=0.2)).flagged
    assert not lowered.at("prompt").decide(verdict(violence=0.3)).flagged
