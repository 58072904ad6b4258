"""What JSON says once decoded, and that every window of a stream is judged so."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tta_middleware.call_text import call_text, decodings, json_reading
from tta_middleware.config import Windows
from tta_middleware.guard.holdback import Check, HoldBack
from tta_middleware.types import Verdict, stricter

HIDDEN = "\\u0066orbidden"


def escaped(text: str) -> str:
    return "".join(f"\\u{ord(letter):04x}" for letter in text)


def checks(text: str, windows: Windows | None) -> list[Check]:
    """All checks of a stream whose verdicts are good and come at once."""
    machine, found = HoldBack(windows), list[Check]()
    pending: list[Any] = []
    for letter in text:
        pending += machine.feed(letter)
        while pending:
            action = pending.pop(0)
            if isinstance(action, Check):
                found.append(action)
                pending += machine.verdict(action.end, safe=True)
    return [*found, *(action for action in machine.finish() if isinstance(action, Check))]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"to": "Bo", "n": [1, 2.5], "on": True, "none": None}, "mail\nto: Bo\nn\n1\n2.5\non: true\nnone: null"),
        ({"a": {"b": {"c": "d"}}}, "mail\na\nb\nc: d"),
        ({"a": [{"b": "c"}, []], "d": {}}, "mail\na\nb: c\n\nd"),
        ({}, "mail"),
        ("Bo", "mail\nBo"),
    ],
)
def test_a_call_is_its_name_its_keys_and_its_values(arguments: Any, text: str) -> None:
    assert call_text("mail", arguments).split() == text.split()


@given(st.recursive(st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)), st.integers(0, 4))
def test_a_call_says_all_of_its_arguments_however_often_they_were_encoded(value: Any, times: int) -> None:
    arguments: Any = {"a": value}
    for _ in range(times):
        arguments = {"body": json.dumps(arguments)}
    said = call_text("f", arguments)

    def parts(item: Any) -> list[str]:
        if isinstance(item, str):
            return [item]
        inner = [*item.keys(), *item.values()] if isinstance(item, dict) else item
        return [part for child in inner for part in parts(child)]

    assert all(part in said for part in parts(value))


@pytest.mark.parametrize(
    ("text", "innermost"),
    [
        (HIDDEN, "forbidden"),
        (escaped("forbidden"), "forbidden"),
        ("\\\\u0066orbidden", "forbidden"),
        ("\\u005cu0066orbidden", "forbidden"),
        ("\\ud83d\\ude00", "😀"),
        ("\\ud83d!", "\ufffd!"),
        ("a\\/b\\nc", "a/b\nc"),
    ],
)
def test_escapes_are_decoded_to_any_depth(text: str, innermost: str) -> None:
    assert decodings(text)[-1] == innermost
    assert json_reading(json.dumps({"a": text})) is not None


def test_deep_encodings_stay_affordable() -> None:
    deep = "\\u005c" * 4000 + "u0066orbidden"
    assert any("forbidden" in reading for reading in decodings(deep))
    assert sum(map(len, decodings(deep))) < 10 * len(deep)


@pytest.mark.parametrize(
    "text",
    ["plain words", '{"a": "plain words"}', "A \\frac{1}{2} and a \\nabla in prose", '```json\n{"a": 1}\n```', ""],
)
def test_what_hides_nothing_is_judged_once(text: str) -> None:
    assert json_reading(text) is None


@pytest.mark.parametrize("text", [f'{{"a": "{HIDDEN}"}}', f'```\n{{"a": "{HIDDEN}"}}\n```', f"It is {HIDDEN}."])
@pytest.mark.parametrize("windows", [Windows(first=n, largest=m) for n in (1, 5, 40) for m in (3, 7)])
def test_an_escape_across_windows_is_decoded(text: str, windows: Windows) -> None:
    assert any("forbidden" in (check.decoded or "") for check in checks(text, windows))
    assert "forbidden" in (checks(text, None)[0].decoded or "")


@pytest.mark.parametrize("at", range(len('{"a": "\\\\u0066 b"}')))
def test_a_context_that_begins_inside_an_escape_reads_all_of_it(at: int) -> None:
    text = '{"a": "\\\\u0066 b"}'
    assert at > text.index("6 b") or "f b" in (json_reading(text, at) or "")


def test_the_stricter_verdict_has_the_highest_score_of_each_category() -> None:
    first, second = Verdict({"a": 0.1, "b": 0.9}, False, "m"), Verdict({"b": 0.2, "c": 0.4}, True, "m")
    assert stricter([first, second]) == Verdict({"a": 0.1, "b": 0.9, "c": 0.4}, True, "m")
    assert stricter([first]) is first
