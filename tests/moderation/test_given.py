"""What wrappers are given: a moderator of the protocol, any object with a ``moderate``, or something else."""

import pytest

from tta_middleware import TTAChatModel
from tta_middleware.errors import ConfigurationError, ModerationUnavailableError
from tta_middleware.moderation.breaker import CircuitBreaker, WithBreaker
from tta_middleware.moderation.cache import Cached
from tta_middleware.moderation.cascade import Cascade
from tta_middleware.moderation.coalesce import Coalescing
from tta_middleware.moderation.ensemble import Ensemble
from tta_middleware.moderation.fallback import WithFallback
from tta_middleware.moderation.hedge import Hedged
from tta_middleware.moderation.limits import Limited, Limiter, RateLimits
from tta_middleware.moderation.parts import InParts
from tta_middleware.moderation.retry import Retrying
from tta_middleware.testing.scripted_engine import ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging
from tta_middleware.types import Verdict

DOWN = ModerationUnavailableError("down", cause="status")
AROUND = {
    "breaker": lambda inner: WithBreaker(inner, CircuitBreaker()),
    "cache": Cached,
    "cascade": lambda inner: Cascade(ScriptedModerator(), inner),
    "cascade, first": lambda inner: Cascade(inner, ScriptedModerator(score=flagging("forbidden"))),
    "coalescing": Coalescing,
    "ensemble": lambda inner: Ensemble([ScriptedModerator(), inner]),
    "fallback": lambda inner: WithFallback(inner, ScriptedModerator()),
    "fallback, second": lambda inner: WithFallback(ScriptedModerator(failures=[DOWN] * 9), inner),
    "hedge": Hedged,
    "limits": lambda inner: Limited(inner, Limiter(RateLimits())),
    "parts": lambda inner: InParts(inner, 1_000),
    "retries": Retrying,
}


class Plain:
    """What the README asks of a moderator, and nothing else."""

    async def moderate(self, texts):
        return [
            Verdict({"violence": 0.9 if "forbidden" in text else 0.1}, flagged=False, model="plain") for text in texts
        ]


@pytest.mark.parametrize("around", AROUND)
def test_any_object_with_a_moderate_may_stand_within_another_moderator(around):
    engine = ScriptedEngine({"Hello": "Good morning to you.", "How?": "Like this: the forbidden thing."})
    model = TTAChatModel(model=engine, moderator=AROUND[around](Plain()), method="none")
    assert model.invoke("Hello").text == "Good morning to you."
    assert model.invoke("How?").response_metadata["tta"]["outcome"] == "blocked"


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("local", r"not a name such as 'local'; write EmbeddedModerator\(\)"),
        (None, "NoneType is neither"),
        (print, "print is neither; write RunnableModerator"),
        (Plain, r"Plain is neither; write Plain\(\.\.\.\)"),
    ],
)
def test_what_is_no_moderator_is_refused_where_it_is_given(around, given, says):
    with pytest.raises(ConfigurationError, match=says):
        AROUND[around](given)


@pytest.mark.parametrize("limit", ["0.3", None, 5, float("nan")])
def test_a_threshold_that_is_no_score_is_told_as_the_moderators(limit):
    mistaken = ScriptedModerator()
    mistaken.default_threshold = limit
    with pytest.raises(ValueError, match="default_threshold of ScriptedModerator is a score in"):
        TTAChatModel(model=ScriptedEngine("-"), moderator=mistaken)
