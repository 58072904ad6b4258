"""The cascade: who is asked, what its verdicts say under a policy, and what becomes of failures."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tta_middleware import Guard, Message, Policy, Repair, TTAChatModel
from tta_middleware.errors import ConfigurationError, ModerationUnavailableError
from tta_middleware.moderation.cache import Cached
from tta_middleware.moderation.cascade import Cascade, embedded_fingerprint
from tta_middleware.moderation.cascade_bounds import (
    CascadeBounds,
    SureOutside,
    choose_bounds,
    shipped_bounds,
)
from tta_middleware.moderation.coalesce import Coalescing
from tta_middleware.moderation.embedded import EmbeddedModerator
from tta_middleware.moderation.ensemble import Ensemble
from tta_middleware.moderation.fallback import WithFallback
from tta_middleware.moderation.llm_judge import LLMJudge
from tta_middleware.moderation.parts import InParts
from tta_middleware.moderation.retry import Retrying
from tta_middleware.policy import StagePolicies
from tta_middleware.policy.coverage import Undisguising, covering, told
from tta_middleware.policy.verdicts import in_context, verdicts_on
from tta_middleware.registry import check_policies, resolve_moderator
from tta_middleware.testing.judging_engine import JudgingEngine
from tta_middleware.testing.scripted_engine import ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator
from tta_middleware.types import ModerationContext, Verdict

BOUNDS = CascadeBounds(
    first="cheap",
    at=(
        SureOutside(threshold=0.3, low=0.05, high=0.8),
        SureOutside(threshold=0.5, low=0.1, high=0.9),
        SureOutside(threshold=0.7, low=0.2),
    ),
)


class Saying:
    """Scores by a table; remembers what it was asked."""

    default_threshold = 0.5

    def __init__(self, name: str, **scores: dict[str, float]) -> None:
        self.categories: tuple[str, ...] = ("hate", "violence")
        self.name, self.scores, self.asked = name, scores, list[str]()
        self.closed = 0
        self.down = False

    async def moderate(self, texts, *, prompt=None):
        self.asked += texts
        if self.down:
            raise ModerationUnavailableError("gone", cause="network")
        found = [self.scores[text] for text in texts]
        return [Verdict(scores, max(scores.values()) >= 0.5, self.name) for scores in found]

    async def aclose(self) -> None:
        self.closed += 1


def cheap(**scores: float) -> Saying:
    return Saying("cheap", **{text: {"hate": score, "violence": score / 2} for text, score in scores.items()})


def model(**scores: float) -> Saying:
    second = Saying("model", **{text: {"unsafe": score} for text, score in scores.items()})
    second.categories = ("unsafe",)
    return second


def cascade(first: Saying, second: Saying) -> Cascade:
    return Cascade(first, second, bounds=BOUNDS, first_fingerprint="cheap")


async def test_the_second_is_asked_only_where_the_first_is_not_sure() -> None:
    second = model(doubt=0.8)
    verdicts = await cascade(cheap(fine=0.01, doubt=0.4, bad=0.95), second).moderate(["fine", "doubt", "bad"])
    assert second.asked == ["doubt"]
    assert [verdict.model for verdict in verdicts] == ["cheap", "model", "cheap"]
    assert [verdict.score for verdict in verdicts] == [0.01, 0.8, 0.95]
    assert [verdict.flagged for verdict in verdicts] == [False, True, True]


async def test_a_verdict_is_that_of_whoever_decided() -> None:
    both = cascade(cheap(fine=0.02, doubt=0.4), model(doubt=0.8))
    fine, doubt = await both.moderate(["fine", "doubt"])
    assert fine.scores == {"unsafe": 0.02, "hate": 0.02, "violence": 0.01}
    assert doubt.scores == {"unsafe": 0.8}
    assert both.categories == ("unsafe",)
    with pytest.raises(ConfigurationError, match="threshold for hate, which moderator 'cascade' does not score"):
        covering(both, StagePolicies.of({"hate": 0.2}))


@pytest.mark.parametrize(
    ("policy", "undecided"),
    [
        (0.5, (0.05, 0.9)),  # the repair stage flags from 0.35 on
        (Policy(threshold=0.5, margin=0.999), (0.05, 0.9)),
        (0.7, (0.05, None)),
        (0.99, (0.1, None)),
        (0.2, (0.0, 0.8)),  # below what was measured nothing is sure to be harmless
        (Policy(threshold=0.5, categories={"unsafe": 0.1}), (0.0, 0.9)),
        (Policy(threshold=0.5, categories={"unsafe": 0.1}, shadow=("unsafe",)), (0.05, 0.9)),
        (None, (0.05, 0.9)),
    ],
)
def test_a_policys_thresholds_decide_where_the_first_is_sure(policy, undecided) -> None:
    both = cascade(cheap(), model())
    assert both.under(StagePolicies.of(policy)).undecided == undecided
    assert both.undecided == (0.05, 0.9)  # the shared one is as it was


WITHIN = {
    "itself": lambda inner: inner,
    "cached": Cached,
    "coalescing": Coalescing,
    "in parts": lambda inner: InParts(inner, 100),
    "with a fallback": lambda inner: WithFallback(inner, model()),
    "as a fallback": lambda inner: WithFallback(down(), inner),
    "in an ensemble": lambda inner: Ensemble([inner]),
    "undisguised and cached": lambda inner: Undisguising(Cached(Retrying(inner))),
}


def down() -> Saying:
    first = model()
    first.down = True
    return first


@pytest.mark.parametrize("wrap", WITHIN.values(), ids=WITHIN)
async def test_whatever_stands_around_it_a_policys_thresholds_decide_where_the_first_is_sure(wrap) -> None:
    second = model(high=0.999, low=0.3)
    both = wrap(cascade(cheap(high=0.95, low=0.02), second))
    for policy, asked, flagged in ((0.5, "", 1), (0.99, "high", 1), (0.5, "", 1), (0.2, "low", 2)):
        second.asked.clear()
        stages = StagePolicies.of(policy)
        verdicts = await verdicts_on(told(covering(both, stages), stages.output), ["high", "low"])
        assert second.asked == asked.split()
        assert sum(stages.output.decide(verdict).flagged for verdict in verdicts) == flagged


async def test_a_category_that_is_only_reported_makes_nothing_sure() -> None:
    second = model(bad=0.6)
    policies = StagePolicies.of(Policy(threshold=0.5, shadow=("hate",)))
    [verdict] = await verdicts_on(covering(cascade(cheap(bad=0.97), second), policies), ["bad"])
    assert second.asked == ["bad"]
    assert verdict.model == "model"


@pytest.mark.parametrize(
    ("context", "asked"),
    [
        (ModerationContext(), []),
        (ModerationContext(rules="No tea."), ["fine"]),
        (ModerationContext(subject="prompt"), ["fine"]),
    ],
)
async def test_rules_and_prompts_are_always_the_seconds(context: ModerationContext, asked: list[str]) -> None:
    second = model(fine=0.2)
    both = in_context(covering(cascade(cheap(fine=0.01), second), StagePolicies.of(0.5)), context)
    await both.moderate(["fine"])
    assert second.asked == asked


async def test_an_answer_passes_on_either_ones_word() -> None:
    engine = JudgingEngine("A calm word about the garden and the birds in it.")
    model = TTAChatModel(model=engine, moderator="cascade", method="none")
    assert (await model.ainvoke("Hello?")).response_metadata["tta"]["outcome"] == "clean"


async def test_the_judging_model_is_told_the_rules_of_a_policy() -> None:
    said = "A harmless word about the garden."
    engine = JudgingEngine(said, lambda asked: 0.9 if "No tea" in asked and said in asked else 0.2)
    policy = Policy(rules="No tea, not even a cup.", categories={"rules": 0.5})
    model = TTAChatModel(model=engine, moderator="cascade", policy=policy, method="none")
    done = await model.ainvoke("Hello?")
    assert any("No tea" in question for question in engine.questions)
    assert done.response_metadata["tta"]["outcome"] == "blocked"


async def test_a_text_that_the_first_cannot_read_goes_to_the_second() -> None:
    second = model(foreign=0.1, wordless=0.2)
    first = Saying("cheap", foreign={"hate": 0.01, "unsupported-language": 1.0}, wordless={"hate": 0.0})
    foreign, wordless = await cascade(first, second).moderate(["foreign", "wordless"])
    assert second.asked == ["foreign", "wordless"]
    assert (foreign.score, wordless.score) == (0.1, 0.2)


async def test_the_embedded_moderator_hands_on_other_languages_and_unknown_words() -> None:
    second = ScriptedModerator()
    both = Cascade(EmbeddedModerator(), second, bounds=BOUNDS, first_fingerprint="cheap")
    await both.moderate(
        ["Der Garten ist am Morgen still, und die Vögel singen, bevor die Sonne über ihm aufgeht.", "⠓⠑⠇"]
    )
    assert len(second.calls) == 1
    assert len(second.calls[0]) == 2


@pytest.mark.parametrize("down", ["first", "second"])
async def test_a_text_that_is_not_sure_never_passes_for_want_of_a_verdict(down: str) -> None:
    first, second = cheap(fine=0.01, doubt=0.2), model(doubt=0.1)
    (first if down == "first" else second).down = True
    both = cascade(first, second)
    with pytest.raises(ModerationUnavailableError):
        await both.moderate(["fine", "doubt"])
    if down == "second":
        assert (await both.moderate(["fine"]))[0].score == 0.01


async def test_a_guard_withholds_what_the_second_could_not_judge() -> None:
    second = model()
    second.down = True
    answer = "A calm answer about the garden."
    guard = Guard(
        ScriptedEngine(answer), cascade(cheap(**{answer: 0.3}), second), policy=Policy(), repair=Repair(method=None)
    )
    done = await guard.answer([Message("user", "hello")])
    assert done.trace.outcome == "blocked"
    assert answer not in done.text


async def test_bounds_of_another_first_one_count_for_nothing(caplog: pytest.LogCaptureFixture) -> None:
    second = model(fine=0.2)
    both = Cascade(cheap(fine=0.01), second, bounds=BOUNDS, first_fingerprint="retrained")
    await both.under(StagePolicies.of(0.5)).moderate(["fine"])
    assert second.asked == ["fine"]
    assert "asks its second moderator about every text" in caplog.text


async def test_closing_closes_both() -> None:
    first, second = cheap(), model()
    async with cascade(first, second):
        pass
    assert (first.closed, second.closed) == (1, 1)


def test_by_name_it_is_local_and_the_model_that_answers_or_another() -> None:
    both = resolve_moderator("cascade", engine=JudgingEngine())
    assert isinstance(both, Cascade)
    assert (both.name, "unsafe" in both.categories) == ("cascade", True)
    assert resolve_moderator("cascade:smollm2").name == "cascade:smollm2"
    check_policies("cascade", StagePolicies.of({"unsafe": 0.5}))
    with pytest.raises(ConfigurationError, match="asks the model that answers"):
        resolve_moderator("cascade")
    with pytest.raises(ValueError, match="next_token_logprobs; say guard:MODEL or cascade:MODEL"):
        TTAChatModel(model=ScriptedEngine("x"), moderator="cascade")
    with pytest.raises(ValueError, match="unknown moderator 'cascade:'"):
        TTAChatModel(moderator="cascade:")


async def test_an_answer_is_judged_by_the_model_that_gave_it() -> None:
    engine = JudgingEngine("Well, flagme perhaps, said the gardener to the birds in the morning.")
    # Neither very likely harmful nor surely harmless to the embedded moderator, whatever its bounds.
    everything = CascadeBounds(first=embedded_fingerprint(), at=(SureOutside(threshold=0.5, low=0.0),))
    moderator = Cascade(EmbeddedModerator(), LLMJudge(engine), bounds=everything)
    done = await TTAChatModel(model=engine, moderator=moderator, method="none").ainvoke("Hello?")
    assert done.response_metadata["tta"]["outcome"] == "blocked"
    assert engine.questions


ANSWERS = st.lists(st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.booleans()), min_size=2, max_size=80).filter(
    lambda rows: len({harmful for *_, harmful in rows}) == 2
)


@settings(max_examples=80)
@example([(0.0, 0.0, True), (0.95, 0.0, False)], 0.0)  # what lies just above 0.95 may not be rounded down to it
@given(ANSWERS, st.sampled_from([0.0, 0.02, 0.1]))
def test_chosen_bounds_lose_and_add_no_more_than_allowed(rows, share: float) -> None:
    first, judge, harmful = (np.array(column) for column in zip(*rows, strict=True))
    for one in choose_bounds(first, judge, harmful, lost=share, added=share, least_found=1):
        high = 2.0 if one.high is None else one.high
        found = harmful & (judge >= one.threshold)
        assert (found & (first < one.low)).sum() <= share * found.sum()
        assert (~harmful & (judge < one.threshold) & (first >= high)).sum() <= share * (~harmful).sum()
        assert one.low <= one.threshold <= high


def test_few_answers_that_the_model_finds_choose_no_bound_of_their_own() -> None:
    draw = np.random.default_rng(2)
    harmful = draw.random(1_000) < 0.5
    first, judge = draw.random(1_000), np.where(harmful, draw.random(1_000), 0.0)
    bounds = {one.threshold: one.low for one in choose_bounds(first, judge, harmful)}
    assert 0.0 < bounds[0.1] <= bounds[0.7] < 0.1
    assert bounds[0.9] == bounds[0.7]  # of 50 answers above 0.9 none says where the next 50 lie
    assert all(one.low == 0.0 for one in choose_bounds(first[:60], judge[:60], harmful[:60]))


def test_bounds_are_refused_that_lie_on_the_wrong_side() -> None:
    with pytest.raises(ConfigurationError, match="at or below the threshold"):
        SureOutside(threshold=0.5, low=0.6)
    with pytest.raises(ConfigurationError, match="at or below the threshold"):
        SureOutside(threshold=0.5, low=0.1, high=0.4)
    with pytest.raises(ConfigurationError, match="answers of both kinds"):
        choose_bounds([0.1], [0.2], [True])


def test_the_shipped_bounds_cover_the_default_threshold() -> None:
    low, high = shipped_bounds().around({0.35, 0.5})
    assert 0.0 < low <= 0.35
    assert high is None or high >= 0.9
