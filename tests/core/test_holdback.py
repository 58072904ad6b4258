"""Invariants of the hold-back machine (DESIGN section 5)."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tta_middleware.errors import ConfigurationError, StreamProtocolError
from tta_middleware.holdback import Action, Check, End, Flagged, HoldBack, Release

BAD = "X"


def cut(text: str, sizes: Sequence[int]) -> list[str]:
    pieces, start = [], 0
    for size in sizes:
        pieces.append(text[start : start + size])
        start += size
    return [*pieces, text[start:]]


def drive(pieces: Sequence[str], window: int | None, lag: int) -> list[Action]:
    """Feed all pieces; answer each check once ``lag`` further pieces have come. Text with an X is unsafe."""
    machine, log, open_checks = HoldBack(window), [], []

    def take(actions: list[Action]) -> None:
        log.extend(actions)
        open_checks.extend([action, lag] for action in actions if isinstance(action, Check))

    def settle(*, all_of_them: bool) -> None:
        while open_checks and (all_of_them or open_checks[0][1] <= 0):
            check, _ = open_checks.pop(0)
            take(machine.verdict(check.end, safe=BAD not in check.text))

    for piece in pieces:
        take(machine.feed(piece))
        settle(all_of_them=False)
        for entry in open_checks:
            entry[1] -= 1
    take(machine.finish())
    settle(all_of_them=True)
    return log


def released(log: Sequence[Action]) -> str:
    return "".join(action.text for action in log if isinstance(action, Release))


texts = st.text(alphabet="ab X", max_size=60)
windows = st.one_of(st.none(), st.integers(1, 12))
cuts = st.lists(st.integers(0, 9), max_size=30)


@given(texts, cuts, windows, st.integers(0, 5))
def test_everything_released_is_a_prefix_that_was_found_safe(
    text: str, sizes: list[int], window: int | None, lag: int
) -> None:
    log = drive(cut(text, sizes), window, lag)
    out = released(log)
    assert text.startswith(out)
    assert BAD not in out
    assert isinstance(log[-1], End) == (BAD not in text)
    if BAD not in text:
        assert out == text


@given(texts, cuts, cuts, windows, st.integers(0, 5))
def test_decisions_do_not_depend_on_the_chunking(
    text: str, one: list[int], other: list[int], window: int | None, lag: int
) -> None:
    first, second = drive(cut(text, one), window, 0), drive(cut(text, other), window, lag)
    assert released(first) == released(second)
    checks = [action for action in first if isinstance(action, Check)]
    others = [action for action in second if isinstance(action, Check)]
    shorter = min(len(checks), len(others))
    assert checks[:shorter] == others[:shorter]


def test_a_flag_ends_the_stream_for_good() -> None:
    machine = HoldBack(2)
    machine.feed("abXX")
    assert machine.verdict(2, safe=True) == [Release("ab")]
    assert machine.verdict(4, safe=False) == [Flagged("ab")]
    assert machine.feed("more") == []
    assert machine.finish() == []


def test_an_empty_answer_is_checked_like_any_other() -> None:
    machine = HoldBack()
    assert machine.finish() == [Check("", 0)]
    assert machine.verdict(0, safe=True) == [End()]


def test_verdicts_out_of_order_are_refused() -> None:
    machine = HoldBack(1)
    machine.feed("ab")
    with pytest.raises(StreamProtocolError, match="no verdict of 2"):
        machine.verdict(2, safe=True)


def test_text_after_the_end_is_refused() -> None:
    machine = HoldBack()
    machine.finish()
    with pytest.raises(StreamProtocolError, match="after the end"):
        machine.feed("late")


def test_a_window_holds_something() -> None:
    with pytest.raises(ConfigurationError, match="at least one"):
        HoldBack(0)
