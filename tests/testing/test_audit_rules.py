"""An honest run is covered; every way of leaving something out is not."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tta_middleware import Policy, Windows
from tta_middleware.guard.holdback import Action, Check, HoldBack, Release
from tta_middleware.testing.audit_rules import covered_loosely, covered_until, covered_whole, passes, readable
from tta_middleware.types import Verdict


@dataclass
class Run:
    """A stream under honest windows: what was scored before each piece left, and what left by then."""

    windows: Windows
    scored: list[str] = field(default_factory=list)
    pieces: list[tuple[int, str, int]] = field(default_factory=list)
    left: str = ""

    def stream(self, text: str, chunk: int) -> Run:
        machine, asked = HoldBack(self.windows), list[Check]()

        def act(actions: list[Action]) -> None:
            for action in actions:
                if isinstance(action, Check):
                    asked.append(action)
                elif isinstance(action, Release):
                    self.pieces.append((len(self.left), action.text, len(self.scored)))
                    self.left += action.text

        for at in range(0, len(text), chunk):
            act(machine.feed(text[at : at + chunk]))
            if len(asked) > 1:
                self._answer(machine, asked, act)
        act(machine.finish())
        while asked:
            self._answer(machine, asked, act)
        return self

    def _answer(self, machine: HoldBack, asked: list[Check], act) -> None:
        check = asked.pop(0)
        self.scored.append(check.text)
        act(machine.verdict(check.end, safe=True))

    def uncovered(self, scored: list[str]) -> list[str]:
        """The pieces that left with a character which none of ``scored``, as far as known by then, covers."""
        known = {text: index for index, text in enumerate(self.scored)}
        found = []
        for begin, piece, count in self.pieces:
            by_then = [text for text in scored if known.get(text, 0) < count]
            left = self.left[: begin + len(piece)]
            if covered_until(left, begin, by_then, self.windows.context) < len(left):
                found.append(piece)
        return found


def runs(in_flight: st.SearchStrategy[int]) -> st.SearchStrategy[Run]:
    return st.builds(
        lambda words, first, largest, context, in_flight, chunk: Run(
            Windows(first=first, largest=largest, context=context, in_flight=in_flight)
        ).stream(" ".join(f"w{index}" for index in range(words)), chunk),
        words=st.integers(1, 120),
        first=st.integers(1, 60),
        largest=st.integers(1, 120),
        context=st.integers(8, 200),  # fewer characters stand in several places of such a text
        in_flight=in_flight,
        chunk=st.integers(1, 90),
    )


RUNS = runs(st.integers(1, 5))


@given(RUNS)
def test_an_honest_run_is_covered(run: Run) -> None:
    assert run.uncovered(run.scored) == []


@given(runs(st.just(1)), st.data())
def test_a_window_that_was_not_scored_is_found(run: Run, data: st.DataObject) -> None:
    """One check at a time, so that no later one, whose context reaches back, was known when its text left."""
    counts = sorted({count for _, _, count in run.pieces})
    skipped = data.draw(st.sampled_from(counts)) - 1
    assert run.uncovered([text for at, text in enumerate(run.scored) if at != skipped])


@given(RUNS)
def test_pieces_that_left_before_their_verdicts_are_found(run: Run) -> None:
    # Half the verdicts, not all but one: small windows are scored several times over before they leave.
    early = [(begin, piece, count // 2) for begin, piece, count in run.pieces]
    ahead = Run(run.windows, run.scored, early, run.left)
    assert ahead.uncovered(run.scored)


@given(RUNS)
def test_a_window_that_was_scored_without_what_stands_before_it_is_found(run: Run) -> None:
    bare = [text[-max(1, len(text) // 2) :] for text in run.scored]
    assert covered_until(run.left, 0, bare, run.windows.context) < len(run.left) or run.left in bare


@given(RUNS)
def test_another_letter_than_the_scored_one_is_found(run: Run) -> None:
    changed = f"{run.left[:-1]}#"
    assert covered_until(changed, 0, run.scored, run.windows.context) < len(changed)


def test_a_whole_answer_was_scored_whole_or_in_parts_where_it_is_too_long() -> None:
    text = " ".join(f"w{index}" for index in range(100))
    parts = [text[:200], text[150:350], text[300:]]
    assert covered_whole(text, [text])
    assert covered_whole(text, [f"{text} and more"])
    assert not covered_whole(text, parts)
    assert covered_whole(text, parts, limit=200, overlap=20)
    assert not covered_whole(text, parts, limit=200, overlap=60)
    assert not covered_whole(text, parts[:2], limit=200, overlap=20)


def test_what_was_put_together_is_covered_by_longer_parts_only() -> None:
    scored = ["The harbour lies at the sea.", "Its market opens at dawn."]
    assert covered_loosely("The harbour lies at the sea. Its market opens at dawn.", scored)
    assert covered_loosely("dawn.", scored)
    assert not covered_loosely("The market lies at the dawn of the harbour", scored)
    assert not covered_loosely("Nobody scored this.", scored)


def test_a_policy_is_held_against_scores_alone() -> None:
    verdict = Verdict({"hate": 0.3, "violence": 0.6}, flagged=True, model="m")
    assert not passes(verdict, Policy(threshold=0.5))
    assert passes(verdict, Policy(threshold=0.5, categories={"violence": 0.7}))
    assert passes(verdict, Policy(threshold=0.5, shadow=("violence",)))
    assert not passes(verdict, Policy(threshold=0.3, shadow=("violence",)))


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ({"type": "text", "text": "words"}, ["words"]),
        ({"body": "\u0066orbidden", "deep": [{"a": ["b"]}]}, ["forbidden", "b"]),
        ('{"a": "\\u0066orbidden"}', ["forbidden"]),
        ('"\\"\\\\u0066orbidden\\""', ["forbidden"]),
        ([1, None, True, b"bytes"], []),
        ({"url": "https://example.org", "title": "A page"}, ["https://example.org", "A page"]),
        ({"id": "call_1", "type": "image", "url": "data:image/png;base64,AAAA", "data": "AAAA"}, []),
        ({"id": "some words", "data": {"a": "b"}, "signature": ["words"]}, ["some words", "b", "words"]),
        ({"type": "x", "input": {"id": "forbidden", "deep": {"data": "b"}}}, ["forbidden", "b"]),
        ({"function": {"arguments": '{"id": "forbidden"}'}}, ["forbidden"]),
    ],
)
def test_strings_are_read_as_they_are_decoded(value: object, found: list[str]) -> None:
    assert list(readable(value)) == found
