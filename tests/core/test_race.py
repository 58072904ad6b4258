"""The race: which rungs it asks for, in which order, and that every step stays inside."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tta_middleware.errors import ConfigurationError
from tta_middleware.methods import Move, Race, Start
from tta_middleware.methods.base import words_ahead
from tta_middleware.protocols import Optimiser
from tta_middleware.types import PromptEmbeddings, Proposal

TINY = Race(
    ladder=(
        Move(label="remind", reminder="Be kind."),
        Move(label="near", words="calm", radius=0.4),
        Move(label="both", words="mild", radius=0.6, reminder="Be kind."),
    )
)


def start(users: Sequence[int] = (2, 3, 4), reach: float = 1.0, width: int = 12) -> Start:
    rng = np.random.default_rng(0)
    mask = np.zeros(6, dtype=np.bool_)
    mask[list(users)] = True
    prompt = PromptEmbeddings(rng.standard_normal((6, width), dtype=np.float32), np.arange(6), mask)
    longer = PromptEmbeddings(
        np.concatenate([rng.standard_normal((2, width), dtype=np.float32), prompt.matrix]),
        np.concatenate([[8, 9], prompt.token_ids]),
        np.concatenate([[False, False], mask]),
    )
    calm, mild = np.eye(width, dtype=np.float32)[:2]
    limits = {word: dict.fromkeys(range(6), reach) for word in ("calm", "mild")}
    return Start(prompt, 0.5, rng, {"calm": calm, "mild": mild}, {"Be kind.": longer}, limits)


def asked(optimiser: Optimiser, count: int, losses: Sequence[float] = ()) -> list[Proposal]:
    """The first ``count`` proposals, one at a time; told ``losses`` as far as they go and 0.5 from then on."""
    seen = []
    for at in range(count):
        (proposal,) = optimiser.ask(1)
        optimiser.tell([proposal], [losses[at] if at < len(losses) else 0.5])
        seen.append(proposal)
    return seen


def share_moved(proposal: Proposal, begin: Start) -> list[float]:
    """Per user row, the length of its move as a share of its norm."""
    prompt = proposal.prompt or begin.prompt
    moved, rows = proposal.matrix[prompt.user_mask], prompt.matrix[prompt.user_mask]
    shares: list[float] = (np.linalg.norm(moved - rows, axis=1) / np.linalg.norm(rows, axis=1)).tolist()
    return shares


def test_rungs_come_in_order_and_begin_again_with_longer_sampled_steps() -> None:
    begin = start()
    proposals = asked(TINY.build(begin), 6, [0.5, 0.5, 0.5])
    assert [proposal.label for proposal in proposals] == ["remind", "near", "both"] * 2
    assert [proposal.temperature for proposal in proposals] == [None] * 3 + [TINY.temperature] * 3
    assert [share_moved(proposal, begin)[0] for proposal in proposals] == pytest.approx(
        [0.0, 0.4, 0.6, 0.0, 0.5, 0.75], abs=1e-5
    )


def test_later_rounds_begin_with_what_came_nearest_to_safe() -> None:
    labels = [proposal.label for proposal in asked(TINY.build(start()), 6, [0.6, 0.1, 0.3])]
    assert labels[3:] == ["near", "both", "remind"]


def test_a_safe_answer_that_was_not_usable_is_sampled_once_before_the_next_rung() -> None:
    proposals = asked(TINY.build(start()), 4, [-0.2, -0.2, 0.5, 0.5])
    assert [proposal.label for proposal in proposals] == ["remind", "remind", "near", "both"]
    assert [proposal.temperature for proposal in proposals] == [None, TINY.temperature, None, None]


@given(st.integers(1, 5), st.lists(st.sampled_from([-0.2, 0.4]), min_size=3, max_size=3))
def test_without_a_temperature_the_ladder_is_climbed_once(wave: int, losses: list[float]) -> None:
    optimiser = TINY.model_copy(update={"temperature": None, "wave": wave}).build(start())
    labels: list[str] = []
    while not optimiser.stop():
        proposals = optimiser.ask(9)
        optimiser.tell(proposals, losses[len(labels) : len(labels) + len(proposals)])
        labels += [proposal.label for proposal in proposals]
    assert labels == ["remind", "near", "both"]
    assert optimiser.stop() == ("end of the ladder",)


def test_a_reminder_moves_the_rows_of_the_reminded_conversation() -> None:
    begin = start()
    remind, near, both = asked(TINY.build(begin), 3)
    assert near.prompt is None
    assert remind.prompt is both.prompt is begin.variants["Be kind."]
    assert np.array_equal(remind.matrix, begin.variants["Be kind."].matrix)


@given(st.integers(1, 12), st.floats(0.0, 1.0), st.floats(0.0, 3.0))
def test_no_step_is_longer_than_its_row_may_go(count: int, reach: float, growth: float) -> None:
    begin = start(reach=reach)
    for proposal in asked(TINY.model_copy(update={"growth": growth}).build(begin), count):
        assert max(share_moved(proposal, begin)) <= reach + 1e-5


@given(st.integers(1, 12))
def test_only_the_users_rows_move(count: int) -> None:
    begin = start()
    for proposal in asked(TINY.build(begin), count):
        prompt = proposal.prompt or begin.prompt
        assert np.array_equal(proposal.matrix[~prompt.user_mask], prompt.matrix[~prompt.user_mask])


def test_without_the_limit_steps_have_their_full_length() -> None:
    begin = start(reach=0.1)
    free = TINY.model_copy(update={"sub_lexical": False})
    assert share_moved(asked(free.build(begin), 2)[1], begin) == pytest.approx([0.4] * 3, abs=1e-5)


def test_a_token_of_unknown_reach_stays_where_it_is() -> None:
    begin = start()
    del begin.reach["calm"][3]  # type: ignore[attr-defined]
    assert share_moved(asked(TINY.build(begin), 2)[1], begin) == pytest.approx([0.4, 0.0, 0.4], abs=1e-5)


def test_a_wave_holds_different_rungs() -> None:
    wave = TINY.model_copy(update={"wave": 3}).build(start()).ask(8)
    assert [proposal.label for proposal in wave] == ["remind", "near", "both"]


@given(st.integers(1, 9), st.integers(1, 9))
def test_no_more_is_asked_for_than_allowed(limit: int, wave: int) -> None:
    optimiser = TINY.model_copy(update={"wave": wave}).build(start())
    assert 1 <= len(optimiser.ask(limit)) <= min(limit, wave)


def test_without_user_rows_only_reminders_are_tried() -> None:
    begin = start(users=())
    assert [proposal.label for proposal in asked(TINY.build(begin), 2)] == ["remind", "remind"]
    steps = Race(ladder=(Move(label="near", words="calm", radius=0.4),)).build(begin)
    assert steps.stop() == ("no movable tokens",)
    assert steps.ask(3) == []


def test_needs_name_every_word_and_reminder_once() -> None:
    assert TINY.needs.words == ("calm", "mild")
    assert TINY.needs.reminders == ("Be kind.",)
    assert TINY.needs.reach > 0.0
    assert TINY.model_copy(update={"sub_lexical": False}).needs.reach == 0.0


@given(st.integers(1, 9), st.sampled_from([1, 2, 4, "free"]), st.lists(st.sampled_from([-0.2, 0.4]), max_size=12))
def test_every_word_is_named_before_a_step_along_it_is_asked_for(
    limit: int, wave: int | str, losses: list[float]
) -> None:
    optimiser, named, told = TINY.model_copy(update={"wave": wave}).build(start()), set[str](), iter(losses)
    words = {move.label: move.words for move in TINY.ladder}
    for _ in range(5):
        named |= set(words_ahead(optimiser, limit))
        proposals = optimiser.ask(limit)
        assert {words[proposal.label] for proposal in proposals} - {""} <= named
        optimiser.tell(proposals, [next(told, 0.4) for _ in proposals])


def test_words_of_later_rungs_are_not_named_yet() -> None:
    optimiser = TINY.build(start())
    assert list(words_ahead(optimiser, 9)) == []
    optimiser.tell(optimiser.ask(1), [0.4])
    assert list(words_ahead(optimiser, 9)) == ["calm"]


def test_no_step_of_the_default_ladder_is_smaller_than_the_first() -> None:
    first, *later = Race().ladder
    assert first.radius == min(move.radius for move in (first, *later) if move.words)


def test_with_free_places_the_first_rung_goes_alone_and_the_others_as_many_as_fit() -> None:
    optimiser = TINY.model_copy(update={"wave": "free"}).build(start())
    first = optimiser.ask(8)
    assert [proposal.label for proposal in first] == ["remind"]
    optimiser.tell(first, [0.4])
    later = optimiser.ask(8)
    assert [proposal.label for proposal in later] == ["near", "both"]
    optimiser.tell(later, [0.3, 0.2])
    assert len(optimiser.ask(1)) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"ladder": ()},
        {"ladder": [{"label": "far", "words": "calm"}]},
        {"ladder": [{"label": "far", "radius": 0.5}]},
        {"ladder": [{"label": "", "reminder": "Be kind."}]},
        {"growth": -0.1},
        {"temperature": 0.0},
    ],
)
def test_broken_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        Race(**settings)
