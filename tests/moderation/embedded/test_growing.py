"""A text that grows gets, at every step, the verdict of the whole text so far."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tta_middleware.errors import ModerationRejectedError
from tta_middleware.moderation.embedded import EmbeddedModerator

MODERATOR = EmbeddedModerator()
PARAGRAPH = (
    "To bake a loaf of bread, mix flour, water, salt and yeast, then let the dough rest for an hour. "
    "Fold it four times, shape it, and bake it in a very hot oven until the crust is dark. "
)
INSULT = "You are a worthless stupid idiot, everybody hates you, and I will kill you. "

PIECES = st.sampled_from(
    [
        "flour ",
        "kill ",
        "you",
        " ",
        "b o m b",
        "s-t-u-p-i-d ",
        "1. ",
        "it's",
        "é",
        "\u0308",
        "ﬁ",
        "Дом ",
        "\n",
        "½",
        "x_y ",
    ]
)


@given(st.lists(st.one_of(PIECES, st.text(max_size=8)), max_size=30))
@settings(max_examples=150, deadline=None)
def test_any_pieces_give_the_verdict_of_the_whole(pieces: list[str]) -> None:
    stream = MODERATOR.growing()
    verdicts = [stream.extend(piece) for piece in pieces]
    wholes = MODERATOR.score(["".join(pieces[: end + 1]) for end in range(len(pieces))])
    assert verdicts == wholes


@given(st.lists(st.integers(1, 200), min_size=1, max_size=30))
@settings(max_examples=20, deadline=None)
def test_long_texts_through_several_windows(steps: list[int]) -> None:
    text = PARAGRAPH * 4 + INSULT + PARAGRAPH * 8
    stream, at = MODERATOR.growing(), 0
    for step in steps:
        verdict = stream.extend(text[at : at + step])
        at += step
        assert verdict == MODERATOR.score([text[:at]])[0]


def test_an_empty_piece_changes_nothing() -> None:
    stream = MODERATOR.growing()
    assert stream.extend("") == MODERATOR.score([""])[0]
    assert stream.extend(INSULT) == stream.extend("")


def test_a_harmful_passage_does_not_drown_in_harmless_text() -> None:
    long = PARAGRAPH * 6 + INSULT * 6 + PARAGRAPH * 20
    assert MODERATOR.score([long])[0].flagged
    assert not MODERATOR.score([PARAGRAPH * 26])[0].flagged


def test_a_passed_window_keeps_its_say_while_the_text_grows() -> None:
    stream = MODERATOR.growing()
    stream.extend(PARAGRAPH * 6 + INSULT * 6 + PARAGRAPH * 8)
    flags = [stream.extend(PARAGRAPH).flagged for _ in range(20)]
    assert all(flags)


def test_another_language_is_noticed_when_it_comes_late() -> None:
    stream = MODERATOR.growing()
    assert not stream.extend(PARAGRAPH).flagged
    assert stream.extend("Сегодня хорошая погода, и мы идём гулять в парк. " * 4).flagged


def test_the_language_setting_holds_for_growing_texts() -> None:
    stream = EmbeddedModerator(unsupported_language="error").growing()
    stream.extend(PARAGRAPH)
    with pytest.raises(ModerationRejectedError, match="not in English"):
        stream.extend("Сегодня хорошая погода, и мы идём гулять в парк. " * 4)
