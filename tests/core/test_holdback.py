"""Invariants of the hold-back machine."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from chunks import in_sizes
from hypothesis import given, settings
from hypothesis import strategies as st

from tta_middleware import Windows
from tta_middleware.errors import StreamProtocolError
from tta_middleware.guard.holdback import Action, Check, End, Flagged, HoldBack, Release

BAD = "X"
LATIN = "ab X"
TEXTS = st.text(alphabet="ab X\n。字", max_size=120)
SIZES = st.lists(st.integers(0, 9), max_size=40)
WINDOWS = st.builds(
    Windows,
    first=st.integers(1, 12),
    largest=st.integers(1, 30),
    context=st.integers(1, 40),
    in_flight=st.integers(1, 4),
)
EAGER = st.builds(Windows, first=st.integers(1, 12), largest=st.integers(1, 30), in_flight=st.just(1000))


class Drive:
    """A stream and a moderator whose answers take a random number of chunks; verdicts are applied in order."""

    def __init__(self, windows: Windows | None, prefix: str = "", seed: int = 0) -> None:
        self.machine = HoldBack(windows, prefix)
        self.log: list[Action] = []
        self.most_open = 0
        self._chance = random.Random(seed)
        self._open: list[tuple[Check, int]] = []
        self._time = 0

    def run(self, pieces: Sequence[str]) -> list[Action]:
        for piece in pieces:
            self._take(self.machine.feed(piece))
            self._time += 1
            self._settle()
        self._take(self.machine.finish())
        self._time = 10_000
        self._settle()
        return self.log

    def _take(self, actions: Sequence[Action]) -> None:
        self.log.extend(actions)
        due = self._time + self._chance.randrange(6)
        self._open += [(action, due) for action in actions if isinstance(action, Check)]
        self.most_open = max(self.most_open, len(self._open))

    def _settle(self) -> None:
        while self._open and self._open[0][1] <= self._time:
            check, _ = self._open.pop(0)
            self._take(self.machine.verdict(check.end, safe=BAD not in check.text))


def released(log: Sequence[Action]) -> str:
    return "".join(action.text for action in log if isinstance(action, Release))


def checks(log: Sequence[Action]) -> list[Check]:
    return [action for action in log if isinstance(action, Check)]


def assert_only_safe_text_left(text: str, sizes: Sequence[int], windows: Windows | None, seed: int) -> None:
    drive = Drive(windows, seed=seed)
    log = drive.run(in_sizes(text, sizes))
    out = released(log)
    assert text.startswith(out)
    assert BAD not in out
    assert isinstance(log[-1], Flagged if BAD in text else End)
    if BAD not in text:
        assert out == text
    assert len(checks(log)) <= len(text) + 1
    if windows is not None:
        assert drive.most_open <= windows.in_flight + 1  # the last window never waits


@given(TEXTS, SIZES, st.none() | WINDOWS, st.integers(0, 10**6))
def test_everything_released_is_a_prefix_that_was_found_safe(
    text: str, sizes: list[int], windows: Windows | None, seed: int
) -> None:
    assert_only_safe_text_left(text, sizes, windows, seed)


@pytest.mark.slow
@settings(max_examples=10_000)
@given(TEXTS, SIZES, st.none() | WINDOWS, st.integers(0, 10**6))
def test_ten_thousand_streams_release_only_what_was_found_safe(
    text: str, sizes: list[int], windows: Windows | None, seed: int
) -> None:
    assert_only_safe_text_left(text, sizes, windows, seed)


@given(TEXTS, SIZES, SIZES, st.none() | EAGER, st.integers(0, 10**6))
def test_decisions_depend_neither_on_chunks_nor_on_latency(
    text: str, one: list[int], other: list[int], windows: Windows | None, seed: int
) -> None:
    first, second = Drive(windows).run(in_sizes(text, one)), Drive(windows, seed=seed).run(in_sizes(text, other))
    assert released(first) == released(second)
    shorter = min(len(checks(first)), len(checks(second)))
    assert checks(first)[:shorter] == checks(second)[:shorter]


@given(TEXTS, SIZES, SIZES, WINDOWS, st.integers(0, 10**6))
def test_a_slow_moderator_changes_the_windows_and_never_the_decision(
    text: str, one: list[int], other: list[int], windows: Windows, seed: int
) -> None:
    first, second = Drive(windows).run(in_sizes(text, one)), Drive(windows, seed=seed).run(in_sizes(text, other))
    assert type(first[-1]) is type(second[-1])


@given(TEXTS, SIZES, WINDOWS, st.integers(0, 10**6))
def test_every_character_is_checked_with_what_comes_before_it(
    text: str, sizes: list[int], windows: Windows, seed: int
) -> None:
    text = text.replace(BAD, "b")
    seen = 0
    *windowed, last = checks(Drive(windows, seed=seed).run(in_sizes(text, sizes)))
    for check in windowed:
        begin = check.end - len(check.text)
        assert text[begin : check.end] == check.text
        assert begin == max(0, seen - windows.context)
        seen = check.end
    assert (last.text, last.end) == (text, len(text))


@given(TEXTS, TEXTS, SIZES, st.none() | WINDOWS, st.integers(0, 10**6))
def test_the_end_is_announced_after_a_check_of_the_whole(
    prefix: str, text: str, sizes: list[int], windows: Windows | None, seed: int
) -> None:
    """Prefix included."""
    prefix, text = prefix.replace(BAD, "b"), text.replace(BAD, "b")
    drive = Drive(windows, prefix, seed=seed)
    log = drive.run(in_sizes(text, sizes))
    assert checks(log)[-1] == Check(prefix + text, len(prefix + text))
    assert log[-1] == End()


@given(TEXTS, TEXTS, SIZES, WINDOWS)
def test_a_prefix_is_context_and_never_released_again(
    prefix: str, text: str, sizes: list[int], windows: Windows
) -> None:
    prefix, text = prefix.replace(BAD, "b"), text.replace(BAD, "b")
    drive = Drive(windows, prefix)
    log = drive.run(in_sizes(text, sizes))
    assert released(log) == text
    assert all((prefix + text)[: check.end].endswith(check.text) for check in checks(log))


@given(st.text(alphabet="ab ", min_size=1, max_size=200), SIZES)
def test_text_is_released_in_whole_words(text: str, sizes: list[int]) -> None:
    log = Drive(Windows(first=7, largest=30)).run(in_sizes(text, sizes))
    out = ""
    for action in log:
        if isinstance(action, Release):
            out += action.text
            rest = text[len(out) :]
            assert not rest or rest[0] == " " or len(action.text) >= 80


def test_windows_double_up_to_the_largest() -> None:
    log = Drive(Windows(first=10, largest=50, in_flight=99)).run(["word " * 40])
    assert [check.end for check in checks(log)] == [10, 30, 70, 120, 170, 200]


def test_a_phrase_across_two_windows_is_seen_whole() -> None:
    machine = HoldBack(Windows(first=4, context=100))
    machine.feed("the forbidden word")
    machine.verdict(4, safe=True)
    (last,) = machine.finish()
    assert isinstance(last, Check)
    assert "forbidden" in last.text


def test_what_waits_behind_open_checks_becomes_one_check() -> None:
    machine = HoldBack(Windows(first=5, largest=5, in_flight=2))
    assert [check.end for check in checks(machine.feed("word " * 6))] == [5, 30]


def test_a_flag_ends_the_stream_for_good() -> None:
    machine = HoldBack(Windows(first=3, largest=3))
    machine.feed("ab cd XX e")
    assert machine.verdict(3, safe=True) == [Release("ab")]
    assert machine.verdict(6, safe=True) == [Release(" cd")]
    assert machine.verdict(9, safe=False) == [Flagged("ab cd")]
    assert machine.feed("more") == []
    assert machine.finish() == []


def test_an_empty_answer_is_checked_like_any_other() -> None:
    machine = HoldBack()
    assert machine.finish() == [Check("", 0)]
    assert machine.verdict(0, safe=True) == [End()]


def test_verdicts_out_of_order_are_refused() -> None:
    machine = HoldBack(Windows(first=1, largest=1))
    machine.feed("ab")
    with pytest.raises(StreamProtocolError, match="no verdict of 2"):
        machine.verdict(2, safe=True)


def test_text_after_the_end_is_refused() -> None:
    machine = HoldBack()
    machine.finish()
    with pytest.raises(StreamProtocolError, match="after the end"):
        machine.feed("late")


def test_a_last_window_that_ends_with_the_text_frees_nothing_before_the_whole_was_checked() -> None:
    machine = HoldBack(Windows(first=4, largest=4, context=1))
    machine.feed("ab cd ef")
    assert machine.finish() == [Check("ab cd ef", 8)]
    assert machine.verdict(4, safe=True) == [Release("ab")]
    assert machine.verdict(8, safe=True) == [Release(" cd")]
    assert machine.verdict(8, safe=False) == [Flagged("ab cd")]


def test_doubtful_text_waits_for_a_verdict_beyond_doubt() -> None:
    machine = HoldBack(Windows(first=3, largest=3))
    machine.feed("ab cd ef gh ")
    assert machine.verdict(3, safe=True) == [Release("ab")]
    assert machine.verdict(6, safe=True, doubtful=True) == []
    assert machine.verdict(9, safe=True) == [Release(" cd ef")]


def test_doubtful_text_leaves_at_the_end_since_it_is_safe() -> None:
    machine = HoldBack(Windows(first=3, largest=3))
    machine.feed("ab cd")
    machine.verdict(3, safe=True, doubtful=True)
    machine.finish()
    assert machine.verdict(5, safe=True, doubtful=True) == [Release("ab cd"), End()]


def test_a_flag_after_doubt_finds_nothing_released() -> None:
    machine = HoldBack(Windows(first=3, largest=3))
    machine.feed("ab cd")
    machine.verdict(3, safe=True, doubtful=True)
    machine.finish()
    assert machine.verdict(5, safe=False) == [Flagged("")]
