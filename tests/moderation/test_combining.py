"""Fallback and ensemble."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tta_middleware.errors import (
    CircuitOpenError,
    ConfigurationError,
    InvalidVerdictError,
    ModerationError,
    ModerationRejectedError,
    ModerationUnavailableError,
)
from tta_middleware.moderation.cascade import Cascade
from tta_middleware.moderation.ensemble import Ensemble
from tta_middleware.moderation.fallback import WithFallback, aligned
from tta_middleware.policy import StagePolicies
from tta_middleware.policy.coverage import covering
from tta_middleware.testing.scripted_moderator import ScriptedModerator
from tta_middleware.types import Verdict

DOWN = ModerationUnavailableError("down", cause="status")


def scoring(name: str = "m", threshold: float = 0.5, **scores: float) -> ScriptedModerator:
    return ScriptedModerator(name, default_threshold=threshold, score=lambda _text: scores)


@pytest.mark.parametrize("failure", [DOWN, CircuitOpenError("open"), InvalidVerdictError("html")])
async def test_the_fallback_answers_when_the_first_cannot(failure):
    first, second = ScriptedModerator("first", failures=[failure]), ScriptedModerator("second")
    moderator = WithFallback(first, second)
    assert [(await moderator.moderate(["flagme"]))[0].model for _ in range(2)] == ["second", "first"]
    assert second.calls == [["flagme"]]
    assert moderator.name == "first"


async def test_a_mistake_of_the_user_is_not_hidden_by_the_fallback():
    second = ScriptedModerator("second")
    moderator = WithFallback(ScriptedModerator(failures=[ModerationRejectedError("key", status=401)]), second)
    with pytest.raises(ModerationRejectedError):
        await moderator.moderate(["x"])
    assert second.calls == []


async def test_when_both_fail_nothing_passes():
    second = ScriptedModerator("second", failures=[InvalidVerdictError("broken")])
    moderator = WithFallback(ScriptedModerator(failures=[DOWN]), second)
    with pytest.raises(ModerationError, match="broken") as caught:
        await moderator.moderate(["x"])
    assert "down" in caught.value.__notes__[0]


async def test_the_fallbacks_scores_are_put_on_the_scale_of_the_first():
    first = ScriptedModerator("first", default_threshold=0.1, failures=[DOWN] * 3)
    for score, expected in ((0.25, 0.05), (0.5, 0.1), (0.75, 0.55)):
        verdicts = await WithFallback(first, scoring(threshold=0.5, hate=score)).moderate(["x"])
        assert verdicts[0].scores["hate"] == pytest.approx(expected)


async def test_the_scale_may_be_left_alone():
    first = ScriptedModerator("first", default_threshold=0.1, failures=[DOWN])
    moderator = WithFallback(first, scoring(hate=0.3), align=False)
    assert (await moderator.moderate(["x"]))[0].scores == {"hate": 0.3}


thresholds = st.floats(0.01, 0.99)
scores = st.floats(0.0, 1.0)


@given(scores, scores, thresholds, thresholds)
def test_alignment_keeps_order_and_what_is_flagged(low, high, threshold, onto):
    low, high = sorted((low, high))
    mapped = [
        aligned(Verdict({"hate": score}, flagged=False, model="m"), threshold, onto).score for score in (low, high)
    ]
    assert mapped[0] <= mapped[1]
    assert [score >= onto for score in mapped] == [score >= threshold for score in (low, high)]


class FailsToClose(ScriptedModerator):
    async def aclose(self):
        raise OSError("the connection is gone")


@pytest.mark.parametrize("combine", [WithFallback, lambda *both: Ensemble(both), Cascade])
async def test_one_that_fails_to_close_leaves_no_other_open(combine):
    other = ScriptedModerator()
    with pytest.raises(OSError, match="gone"):
        await combine(FailsToClose(), other).aclose()
    assert other.closed == 1


async def test_both_are_closed():
    first, second = ScriptedModerator(), ScriptedModerator()
    async with WithFallback(first, second):
        pass
    assert (first.closed, second.closed) == (1, 1)


async def test_max_flags_what_any_member_flags():
    moderator = Ensemble([scoring(hate=0.1, violence=0.9), scoring(hate=0.3)])
    verdict = (await moderator.moderate(["x"]))[0]
    assert verdict.scores == {"hate": 0.3, "violence": 0.9}
    assert verdict.flagged


async def test_mean_counts_the_members_that_score_a_category():
    moderator = Ensemble([scoring(hate=0.2, violence=0.4), scoring(hate=0.6)], "mean")
    assert (await moderator.moderate(["x"]))[0].scores == pytest.approx({"hate": 0.4, "violence": 0.4})


async def test_weights_shift_the_mean_and_a_weight_of_zero_leaves_out():
    members = [scoring(hate=0.0), scoring(hate=1.0), scoring(sexual=1.0)]
    moderator = Ensemble(members, "weighted", weights=[3.0, 1.0, 0.0])
    assert (await moderator.moderate(["x"]))[0].scores == pytest.approx({"hate": 0.25})


def test_a_member_of_no_weight_scores_nothing_that_a_policy_could_enforce():
    local, other = ScriptedModerator("local"), ScriptedModerator("other")
    local.categories, other.categories = ("hate",), ("hate", "violence")
    both = Ensemble([local, other], "weighted", weights=[1.0, 0.0])
    assert both.categories == ("hate",)
    with pytest.raises(ConfigurationError, match="violence"):
        covering(both, StagePolicies.of({"violence": 0.2}))


async def test_members_are_compared_on_one_scale():
    strict, lax = scoring(threshold=0.1, hate=0.1), scoring(threshold=0.9, hate=0.1)
    moderator = Ensemble([strict, lax], "mean")
    verdict = (await moderator.moderate(["x"]))[0]
    assert verdict.score == pytest.approx((0.5 + 0.5 / 9) / 2)


async def test_first_decisive_asks_the_next_only_about_doubtful_texts():
    marks = {"sure": 0.01, "bad": 0.95, "doubtful": 0.5, "unclear": 0.4}
    first = ScriptedModerator("quick", score=lambda text: {"hate": marks[text]})
    second = ScriptedModerator("slow", score=lambda text: {"hate": 0.6 if text == "doubtful" else 0.3})
    verdicts = await Ensemble([first, second], "first-decisive").moderate(list(marks))
    assert [verdict.model for verdict in verdicts] == ["quick", "quick", "slow", "slow"]
    assert [verdict.flagged for verdict in verdicts] == [False, True, True, False]
    assert second.calls == [["doubtful", "unclear"]]


@pytest.mark.parametrize("combine", ["max", "mean", "first-decisive"])
async def test_a_missing_voice_is_not_a_pass(combine):
    members = [ScriptedModerator(failures=[DOWN]), ScriptedModerator()]
    with pytest.raises(ModerationUnavailableError):
        await Ensemble(members, combine).moderate(["x"])


async def test_an_ensemble_closes_its_members_and_asks_nothing_about_nothing():
    members = [ScriptedModerator(), ScriptedModerator()]
    async with Ensemble(members, "mean") as moderator:
        assert await moderator.moderate([]) == []
    assert [(member.closed, member.calls) for member in members] == [(1, []), (1, [])]


@pytest.mark.parametrize(
    ("members", "options"),
    [
        (0, {}),
        (2, {"combine": "weighted"}),
        (2, {"combine": "weighted", "weights": [1.0]}),
        (2, {"combine": "weighted", "weights": [1.0, -1.0]}),
        (2, {"combine": "weighted", "weights": [0.0, 0.0]}),
        (2, {"combine": "weighted", "weights": [1.0, float("nan")]}),
        (2, {"combine": "mean", "weights": [1.0, 1.0]}),
        (2, {"combine": "first-decisive", "undecided": (0.6, 0.9)}),
    ],
)
def test_mistakes_are_told_at_construction(members, options):
    with pytest.raises(ConfigurationError):
        Ensemble([ScriptedModerator() for _ in range(members)], **options)
