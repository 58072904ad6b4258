"""The request's field ``tta``: a client may ask for more than the operator has, never for less."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from staged_server import CALM, NOTICE, Served, running, scripted

from tta_middleware.policy import Policy, StagePolicies
from tta_middleware.testing.scripted_moderator import ScriptedModerator
from tta_middleware.types import Verdict

CATEGORIES = ("hate", "illicit", "violence")


def graded(text: str) -> dict[str, float]:
    return {"illicit": 0.3 if "roses" in text else 0.05, "violence": 0.1, "hate": 0.0}


@pytest.fixture(scope="module")
def graded_server() -> Any:
    policy = Policy(threshold=0.5, categories={"violence": 0.2}, shadow=("hate",))
    with running(scripted(moderator=ScriptedModerator(score=graded), policy=policy)) as one:
        yield one


def ask(served: Served, text: str = "Flowers?", **tta: Any) -> httpx.Response:
    body = {"model": "roses", "messages": [{"role": "user", "content": text}], "tta": tta}
    return httpx.post(f"{served.url}/v1/chat/completions", json=body)


@pytest.mark.parametrize("tta", [{"threshold": 0.25}, {"categories": {"violence": 0.1}}, {"categories": {"hate": 0}}])
def test_lower_thresholds_are_in_force(graded_server: Served, tta: Any) -> None:
    assert ask(graded_server).json()["choices"][0]["message"]["content"] == CALM
    answer = ask(graded_server, **tta)
    assert answer.status_code == 200
    assert answer.headers["x-tta-policy"] == "default (stricter)"
    assert answer.json()["choices"][0]["message"]["content"] == NOTICE
    assert answer.json()["tta"]["outcome"] == "blocked"


def test_a_prompt_check_can_be_added(graded_server: Served) -> None:
    checked = ask(graded_server, prompt_check="user").json()
    assert checked["tta"]["moderation_calls"] == ask(graded_server).json()["tta"]["moderation_calls"] + 1


@pytest.mark.parametrize(
    ("tta", "words"),
    [
        ({"threshold": 0.6}, "at most 0.5 here, not 0.6"),
        ({"categories": {"violence": 0.3}}, "'violence' may be lowered only: at most 0.2"),
        ({"threshold": 0.1, "categories": {"illicit": 0.7}}, "'illicit' may be lowered only: at most 0.5"),
    ],
)
def test_what_would_weaken_is_refused(graded_server: Served, tta: Any, words: str) -> None:
    answer = ask(graded_server, **tta)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (403, "policy_weakened")
    assert words in error["message"]


def test_a_weaker_prompt_check_is_refused() -> None:
    with running(scripted(prompt_check="user")) as served:
        assert ask(served, prompt_check="off").status_code == 403
        assert ask(served, prompt_check="all").status_code == 200


@pytest.mark.parametrize(
    "tta",
    [
        {"treshold": 0.1},
        {"threshold": -0.1},
        {"threshold": "0.1"},
        {"categories": {"hats": 0.1}},
        {"categories": {"sexual": 0.1}},  # which this moderator does not score
        {"on_error": "open"},
        {"shadow": ["illicit"]},
    ],
)
def test_anything_else_is_refused(tta: Any) -> None:
    class Three(ScriptedModerator):
        categories = CATEGORIES

    with running(scripted(moderator=Three(score=graded))) as served:
        assert ask(served, **tta).status_code == 400


UNIT = st.floats(0, 1)
PARTIAL = st.dictionaries(st.sampled_from(CATEGORIES), UNIT)


@settings(max_examples=50)
@given(
    UNIT,
    PARTIAL,
    st.lists(st.sampled_from(CATEGORIES), unique=True),
    UNIT | st.none(),
    PARTIAL,
    st.tuples(UNIT, UNIT, UNIT),
)
def test_whatever_was_flagged_still_is(
    base: float, own: dict[str, float], shadow: list[str], asked: float | None, asked_for: dict[str, float], scores: Any
) -> None:
    before = StagePolicies.of(Policy(threshold=base, categories=own, shadow=tuple(shadow)))
    after = before.lowered(asked, asked_for)
    verdict = Verdict(dict(zip(CATEGORIES, scores, strict=True)), flagged=False, model="m")
    for stage in ("prompt", "output", "repair"):
        assert after.at(stage).decide(verdict).flagged >= before.at(stage).decide(verdict).flagged
    if before.weakened_by(asked, asked_for) is None and asked is not None:
        assert all(after.output.limit(name) <= asked for name in CATEGORIES)
