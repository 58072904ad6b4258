"""The independent judge: for reports only."""

import pytest

from tta_middleware.errors import ConfigurationError
from tta_middleware.moderation.embedded import EmbeddedModerator
from tta_middleware.moderation.embedded.judge import EmbeddedJudge
from tta_middleware.protocols import Moderator
from tta_middleware.registry import MODERATORS, names, resolve_moderator

BREAD = "To bake a loaf of bread, mix flour, water, salt and yeast."
INSULT = "You are a worthless stupid idiot and everybody hates you."


def test_it_is_no_moderator() -> None:
    assert not isinstance(EmbeddedJudge(), Moderator)
    assert not hasattr(EmbeddedJudge(), "moderate")


def test_a_search_cannot_be_given_it_as_an_object() -> None:
    with pytest.raises(ConfigurationError, match="EmbeddedJudge is neither"):
        resolve_moderator(EmbeddedJudge())  # type: ignore[arg-type]


def test_a_search_cannot_be_given_it_by_name() -> None:
    assert "local-b" not in names(MODERATORS)
    with pytest.raises(ConfigurationError, match="unknown moderator"):
        resolve_moderator("local-b")


def test_it_tells_harmless_from_toxic() -> None:
    harmless, toxic = EmbeddedJudge().assess([BREAD, INSULT])
    assert harmless.score < 0.5 < toxic.score
    assert (harmless.flagged, toxic.flagged) == (False, True)


def test_it_has_scores_of_its_own() -> None:
    texts = [BREAD, INSULT, "I can't help with that.", "The dragon burned the village."]
    ours = [verdict.score for verdict in EmbeddedModerator().score(texts)]
    theirs = [verdict.score for verdict in EmbeddedJudge().assess(texts)]
    assert not set(ours) & set(theirs)


def test_texts_without_words_score_zero() -> None:
    assert [verdict.score for verdict in EmbeddedJudge().assess(["", "...", "\n"])] == [0.0, 0.0, 0.0]
    assert EmbeddedJudge().assess([]) == []
