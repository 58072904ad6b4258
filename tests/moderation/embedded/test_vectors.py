"""Word vectors: what a text's words say together, whatever their order and number."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tta_middleware.moderation.embedded.artifact import load
from tta_middleware.moderation.embedded.features import hash_words
from tta_middleware.moderation.embedded.moderator import ARTIFACT
from tta_middleware.moderation.embedded.vectors import PRIOR_MASS, WordVectors

WORDS = ("bake", "bread", "hurt")


@pytest.fixture(scope="module")
def vectors() -> WordVectors:
    """Two hidden units: one rises with ``hurt``, one with ``bread``; the second lowers what the first says."""
    keys = hash_words(WORDS).astype(np.uint32)
    order = np.argsort(keys)
    rows = np.array([[0, 0], [0, 100], [100, 0]], dtype=np.int8)[order]
    mass = np.full(3, 255, dtype=np.uint8)
    return WordVectors(keys[order], rows, mass, np.ones(2), np.zeros(2), np.array([1.0, -1.0]), 0.5)


def logit(vectors: WordVectors, *tokens: str) -> float:
    return vectors.logit(hash_words(tokens))


def test_unknown_words_leave_the_constant(vectors: WordVectors) -> None:
    assert logit(vectors) == logit(vectors, "quux", "zyzzyva") == 0.5


def test_known_words_count_against_the_prior_mass(vectors: WordVectors) -> None:
    assert logit(vectors, "hurt") == pytest.approx(0.5 + 100 / (PRIOR_MASS + 1))
    assert logit(vectors, "hurt", "bread") == pytest.approx(0.5)
    assert logit(vectors, "hurt", "bake") == pytest.approx(0.5 + 100 / (PRIOR_MASS + 2))


@settings(max_examples=30)
@given(st.lists(st.sampled_from([*WORDS, "quux"]), max_size=12), st.randoms(use_true_random=False))
def test_neither_order_nor_repetition_matters(vectors: WordVectors, tokens: list[str], chance: object) -> None:
    shuffled = tokens * 2
    chance.shuffle(shuffled)  # type: ignore[attr-defined]
    assert logit(vectors, *tokens) == logit(vectors, *shuffled)


def test_the_moderator_has_them_and_they_know_common_words() -> None:
    vectors = load(ARTIFACT).vectors
    assert vectors is not None
    common = hash_words(["the", "kitchen", "weapon", "journey", "astronomy"])
    assert len(vectors.known(common)) == len(common)
    assert np.all(np.diff(vectors.keys.astype(np.int64)) > 0)
