"""What another server's model thinks: given out as it is checked, or hidden; unchecked only if the policy says so."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_openai import ChatOpenAI
from staged_server import CALM, NOTICE, running, scripted, thinking_model
from staged_upstream import USAGE, Upstream, Wire, completion, delta, told, upstream

from tta_middleware.config import Windows
from tta_middleware.errors import FlaggedError
from tta_middleware.guard.moderated import Thoughts, moderated
from tta_middleware.policy import Policy, StagePolicies
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging
from tta_middleware.types import TextDelta

ROSES: Any = [{"role": "user", "content": "How do I keep roses?"}]
THOUGHT = "They ask about roses. Roses want water and sun, and that is what I am going to tell them here."
BAD_THOUGHT = f"{THOUGHT} Or I tell them of the forbidden part, which nobody is to read in any thought of mine."
COUNTED = USAGE | {"completion_tokens_details": {"reasoning_tokens": 5}}


def thinking(
    thought: str = THOUGHT, *, field: str = "reasoning_content", usage: Any = COUNTED, text: str = CALM
) -> Any:
    """An upstream that thinks word by word before it answers."""

    def plan(wire: Wire) -> None:
        if wire.body.get("stream"):
            words = [delta(**{field: word}) for word in thought.replace(" ", " \0").split("\0")]
            wire.stream([*words, *told(text)[:-1], {"choices": [], "usage": usage}])
        else:
            wire.answer(completion(text, **{field: thought}) | {"usage": usage})

    return plan


def ask(behind: Upstream, *, stream: bool, messages: Any = ROSES, **settings: Any) -> Any:
    """A completion, or the chunks of one, of an upstream with these settings."""
    with running({"far": behind.model(**settings)}) as served, served.client() as api:
        options: Any = {"stream_options": {"include_usage": True}} if stream else {}
        found = api.chat.completions.create(model="far", messages=messages, stream=stream, **options)
        return list(found) if stream else found


def said(found: Any, field: str = "content") -> str:
    if not isinstance(found, list):
        return str(getattr(found.choices[0].message, field, None) or "")
    return "".join(getattr(chunk.choices[0].delta, field, None) or "" for chunk in found if chunk.choices)


def ending(found: Any) -> tuple[str, dict[str, Any]]:
    last = next(one for one in reversed(found) if one.choices) if isinstance(found, list) else found
    return last.choices[0].finish_reason, last.model_extra["tta"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_thoughts_that_are_shown_come_checked_under_both_names(field: str, stream: bool) -> None:
    with upstream(thinking(field=field)) as behind:
        found = ask(behind, stream=stream, reasoning="show")
    assert (said(found, "reasoning_content"), said(found, "reasoning"), said(found)) == (THOUGHT, THOUGHT, CALM)
    reason, trace = ending(found)
    assert (reason, trace["outcome"]) == ("stop", "clean")
    about = trace["reasoning"]
    assert (about["mode"], about["checked"], about["tokens"]) == ("show", True, 5)
    assert about["score"]["flagged"] is False
    usage = found[-1].usage if stream else found.usage
    assert usage.completion_tokens_details.reasoning_tokens == 5
    if stream:
        kinds = [
            bool(chunk.choices[0].delta.content)
            for chunk in found
            if chunk.choices and said([chunk]) + said([chunk], "reasoning")
        ]
        assert len(kinds) > 3
        assert kinds == sorted(kinds), "a thought after the answer had begun"


@pytest.mark.parametrize("stream", [False, True])
def test_hidden_thoughts_stay_and_the_trace_tells_of_them(stream: bool) -> None:
    with upstream(thinking(usage=USAGE)) as behind:
        found = ask(behind, stream=stream)
    assert (said(found), said(found, "reasoning"), said(found, "reasoning_content")) == (CALM, "", "")
    about = ending(found)[1]["reasoning"]
    assert (about["mode"], about["checked"]) == ("hide", True)
    assert about["tokens"] == (len(THOUGHT.split()) if stream else 1)
    assert THOUGHT[:20] not in str(found)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("mode", ["show", "hide"])
def test_a_flagged_thought_ends_the_answer(mode: str, stream: bool) -> None:
    with upstream(thinking(BAD_THOUGHT)) as behind:
        found = ask(behind, stream=stream, reasoning=mode)
    reason, trace = ending(found)
    assert (reason, trace["outcome"], trace["stop_reason"]) == ("content_filter", "blocked", "flagged: reasoning")
    assert said(found) == NOTICE
    assert "forbidden" not in str(found)
    left = said(found, "reasoning")
    assert BAD_THOUGHT.startswith(left)
    assert bool(left) == (stream and mode == "show")


@pytest.mark.parametrize("mode", ["show", "hide"])
def test_the_policys_own_stage_decides_on_thoughts(mode: str) -> None:
    lax = StagePolicies.from_table({"threshold": 0.5, "reasoning": {"threshold": 1.0}})
    with upstream(thinking(BAD_THOUGHT)) as behind:
        found = ask(behind, stream=True, reasoning=mode, policy=lax, moderator=half())
        strict = ask(behind, stream=True, reasoning=mode, moderator=half(), policy=0.5)
    assert (ending(found)[1]["outcome"], said(found)) == ("clean", CALM)
    assert said(found, "reasoning") == (BAD_THOUGHT if mode == "show" else "")
    assert ending(strict)[1]["outcome"] == "blocked"


def half() -> ScriptedModerator:
    return ScriptedModerator(score=lambda text: {"illicit": 0.9 if "forbidden" in text else 0.1})


def test_hidden_thoughts_are_unchecked_only_where_the_policy_says_so() -> None:
    unchecked = StagePolicies.from_table({"threshold": 0.5, "hidden_reasoning": "unchecked"})
    with upstream(thinking(BAD_THOUGHT)) as behind:
        hidden = ask(behind, stream=True, policy=unchecked)
        shown = ask(behind, stream=True, policy=unchecked, reasoning="show")
    assert (said(hidden), ending(hidden)[1]["reasoning"]["checked"]) == (CALM, False)
    assert "forbidden" not in str(hidden)
    assert ending(shown)[1]["outcome"] == "blocked"


def test_where_all_is_held_thoughts_of_a_flagged_answer_are_too() -> None:
    with upstream(thinking(text=f"{CALM} And the forbidden part.")) as behind:
        found = ask(behind, stream=True, reasoning="show", release="end")
        whole = ask(behind, stream=False, reasoning="show")
        calm = ask(behind, stream=True, reasoning="show", release="window")
    assert (said(found), said(found, "reasoning")) == (NOTICE, "")
    assert (said(whole), said(whole, "reasoning")) == (NOTICE, "")
    assert said(calm, "reasoning") == THOUGHT
    assert said(calm).endswith(NOTICE)


def test_what_a_stand_in_thinks_is_its_own_affair() -> None:
    with upstream(thinking(text=f"{CALM} And the forbidden part.")) as behind:
        other = thinking_model("show")
        found = ask(behind, stream=True, hand_over="own", stand_in=other)
    assert said(found, "reasoning").startswith("They ask about roses.")
    assert said(found).endswith(CALM)
    assert "forbidden" not in str(found)


def test_thoughts_of_two_models_are_never_read_as_one() -> None:
    bad = ScriptedModerator(score=lambda text: {"illicit": 0.9 if "forbidden" in text or "here.They" in text else 0.1})
    with upstream(thinking(text=f"{CALM} And the forbidden part.")) as behind:
        own = {"hand_over": "own", "stand_in": thinking_model("show", moderator=bad)}
        found = ask(behind, stream=True, reasoning="show", moderator=bad, **own)
    assert said(found, "reasoning") == THOUGHT
    assert ending(found)[1]["handed_over"]["stop_reason"] == "flagged: text"
    assert said(found).endswith(CALM)


@pytest.mark.parametrize("mode", ["show", "hide"])
def test_thoughts_of_earlier_turns_go_where_thoughts_are_shown(mode: str) -> None:
    earlier = {"role": "assistant", "content": CALM, "reasoning_content": THOUGHT}
    with upstream(thinking()) as behind:
        ask(behind, stream=False, reasoning=mode, messages=[*ROSES, earlier, {"role": "user", "content": "Tulips?"}])
        [asked] = behind.requests
    assert ("reasoning_content" in asked.body["messages"][1]) == (mode == "show")


def test_langchains_client_and_responses() -> None:
    with upstream(thinking()) as behind, running({"far": behind.model(reasoning="show")}) as served:
        chat = ChatOpenAI(model="far", base_url=f"{served.url}/v1", api_key="none", stream_usage=True)
        chunks = list(chat.stream("Roses?"))
        assert "".join(chunk.text for chunk in chunks) == CALM
        response = httpx.post(f"{served.url}/v1/responses", json={"model": "far", "input": "Roses?"}).json()
    assert [item["type"] for item in response["output"]] == ["message"]
    assert response["usage"]["output_tokens_details"]["reasoning_tokens"] == 5
    assert THOUGHT[:20] not in str(response)


def test_a_stand_in_is_not_shown_what_was_thought() -> None:
    with upstream(thinking(BAD_THOUGHT)) as behind:
        found = ask(behind, stream=True, reasoning="show", hand_over="own", stand_in=scripted())
    assert ending(found)[1]["handed_over"]["stop_reason"] == "flagged: reasoning"
    assert said(found) == CALM


WORDS = st.lists(st.sampled_from(["rose ", "sun, ", "forbidden ", "a", " ", "water. "]), max_size=30).map("".join)


@settings(max_examples=40, deadline=None)
@given(thought=WORDS, text=WORDS, cuts=st.lists(st.integers(1, 9), min_size=1, max_size=9), hold=st.booleans())
async def test_any_cut_of_thought_and_text_gives_what_was_checked_and_no_more(
    thought: str, text: str, cuts: list[int], hold: bool
) -> None:
    """The auditor around each test holds what left against what was scored."""
    left, moderator = list[str](), ScriptedModerator(score=flagging("forbidden"))

    async def source() -> Any:
        for whole, channel in ((thought, "reasoning"), (text, "answer")):
            at, number = 0, 0
            while at < len(whole):
                width, number = cuts[number % len(cuts)], number + 1
                yield TextDelta(whole[at : at + width], channel=channel)  # type: ignore[arg-type]
                at += width

    async def think(piece: str) -> None:
        left.append(piece)

    pieces, error = list[str](), None
    way = Thoughts(moderator, Policy(threshold=0.5), think)
    cut = Windows(first=8, largest=16)
    try:
        async for piece in moderated(source(), moderator, Policy(threshold=0.5), windows=cut, hold=hold, thoughts=way):
            pieces.append(piece)
    except FlaggedError as flagged:
        error = flagged
    assert (error is not None) == ("forbidden" in f"{thought}|{text}")
    assert error is None or error.thought == ("forbidden" in thought)
    assert thought.startswith("".join(left))
    assert text.startswith("".join(pieces))
    assert "forbidden" not in "".join(left) + "".join(pieces)
    if error is None:
        assert ("".join(left), "".join(pieces)) == (thought, text)
    if pieces:
        assert "".join(left) == thought, "text before the thoughts in front of it"
