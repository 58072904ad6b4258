"""Upstreams that say odd things: ends that come twice or never, calls that are none, shapes that nobody expects."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from staged_server import CALM, NOTICE, running, scripted
from staged_upstream import USAGE, completion, delta, saying, told, upstream, words
from test_upstream import ROSES, TOOLS, ask, calls, ending_of, text_of

from tta_middleware.guard.ledger import Ledger
from tta_middleware.server import upstream_client
from tta_middleware.testing.auditor import AuditError, Auditor
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging

ODD: dict[str, Any] = {
    "a delta that is text": {"choices": [{"index": 0, "delta": "secret"}]},
    "a delta that is a list": {"choices": [{"index": 0, "delta": ["secret"]}]},
    "calls that are a number": delta(tool_calls=7),
    "a call that is text": delta(tool_calls=["secret"]),
    "an end that is a list": delta(finish_reason=["stop"]),
    "an end that is a number": delta(finish_reason=3),
    "choices that are text": {"choices": "secret"},
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", ODD)
def test_an_odd_shape_is_the_upstreams_fault(name: str, late: bool) -> None:
    events = [*(words(CALM) if late else ()), ODD[name]]
    with upstream(lambda wire: wire.stream(events)) as behind, pytest.raises(openai.APIError) as found:
        ask(behind, stream=True)
    if not late:
        assert getattr(found.value, "status_code", None) == 502
    assert found.value.code == "upstream_broken"
    assert "secret" not in str(found.value)


@pytest.mark.parametrize("said", [{"id": "x" * 40}, {"function": {"name": "x" * 40}}, {}])
def test_an_answer_of_calls_without_end_is_broken_off(said: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_client, "MOST_CHARACTERS", 30)
    calls = [delta(tool_calls=[{"index": at, "function": {}, **said}]) for at in range(40)]
    events = [*calls, delta(finish_reason="tool_calls")]
    with upstream(lambda wire: wire.stream(events)) as behind, pytest.raises(openai.APIError) as found:
        ask(behind, stream=True)
    assert found.value.code == "upstream_broken"


@pytest.mark.parametrize("done", [True, False])
def test_an_end_that_comes_twice_and_one_without_done(done: bool) -> None:
    end = delta(finish_reason="length")
    events = [*words(CALM), end, end, {"choices": [], "usage": USAGE}]

    def plan(wire: Any) -> None:
        wire.stream(events, done=done)
        if not done:
            wire.handler.wfile.write(b"0\r\n\r\n")

    with upstream(plan) as behind:
        found = ask(behind, stream=True)
    assert text_of(found) == CALM
    assert ending_of(found)[0] == "length"
    assert [one.choices[0].finish_reason for one in found if one.choices].count("length") == 1


def test_a_choice_whose_index_is_null_is_the_first() -> None:
    choices = [{**event["choices"][0], "index": None} for event in (*words(CALM), delta(finish_reason="stop"))]
    with upstream(lambda wire: wire.stream([{"choices": [choice]} for choice in choices])) as behind:
        found = ask(behind, stream=True)
    assert text_of(found) == CALM
    assert ending_of(found)[0] == "stop"


def test_words_after_the_end_are_checked_like_any_other() -> None:
    events = [
        *words(CALM),
        delta(finish_reason="stop"),
        *words(" And the forbidden part."),
        delta(finish_reason="stop"),
    ]
    with upstream(lambda wire: wire.stream(events)) as behind:
        found = ask(behind, stream=True)
    assert "forbidden" not in text_of(found)
    assert text_of(found).endswith(NOTICE)


@pytest.mark.parametrize("stream", [False, True])
def test_a_broken_call_is_judged_together_with_the_text_before_it(stream: bool) -> None:
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "water", "arguments": 'idden": '}}
    events = [*words("Then comes the forb"), delta(tool_calls=[call]), delta(finish_reason="tool_calls")]
    whole = completion("Then comes the forb", "tool_calls", tool_calls=[call])
    with upstream(lambda wire: wire.stream(events) if stream else wire.answer(whole)) as behind:
        found = ask(behind, stream=stream, tools=TOOLS)
    assert "forbidden" not in text_of(found)
    assert ending_of(found)[:2] == ("content_filter", "blocked")


@pytest.mark.no_audit("plants a leak")
@pytest.mark.parametrize("stream", [False, True])
def test_the_auditor_hears_of_words_that_were_judged_apart(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = Ledger.passes
    monkeypatch.setattr(Ledger, "passes", lambda self, texts, prompt=None: passes(self, texts[:2], prompt))
    events = [*words("Then comes the forb"), *calls('idden": ')]
    call = {"id": "c1", "type": "function", "function": {"name": "water", "arguments": 'idden": '}}
    whole = completion("Then comes the forb", "tool_calls", tool_calls=[call])
    with upstream(lambda wire: wire.stream(events) if stream else wire.answer(whole)) as behind:
        audit = Auditor()
        with audit:
            assert "forbidden" in text_of(ask(behind, stream=stream, tools=TOOLS))
            with pytest.raises(AuditError, match="not scored whole"):
                audit.check()


@pytest.mark.parametrize("index", [0, None])
def test_calls_that_share_an_index_stay_apart(index: int | None) -> None:
    def call(number: int, what: str) -> dict[str, Any]:
        function = {"name": "water", "arguments": json.dumps({"what": what})}
        where = {} if index is None else {"index": index}
        return delta(tool_calls=[{**where, "id": f"c{number}", "type": "function", "function": function}])

    events = [call(1, "roses"), call(2, "tulips"), delta(finish_reason="tool_calls")]
    with upstream(lambda wire: wire.stream(events)) as behind:
        found = ask(behind, stream=True, tools=TOOLS)
    made = [one for chunk in found if chunk.choices for one in chunk.choices[0].delta.tool_calls or ()]
    assert [(one.index, one.id, json.loads(one.function.arguments)["what"]) for one in made] == [
        (0, "c1", "roses"),
        (1, "c2", "tulips"),
    ]


def test_pieces_of_two_calls_that_come_by_turns() -> None:
    def piece(index: int, **function: str) -> dict[str, Any]:
        begins = {"id": f"c{index}", "type": "function"} if "name" in function else {}
        return delta(tool_calls=[{"index": index, **begins, "function": function}])

    events = [
        piece(0, name="water", arguments='{"what"'),
        piece(1, name="water", arguments='{"what"'),
        piece(0, arguments=': "roses"}'),
        piece(1, arguments=': "tulips"}'),
        delta(finish_reason="tool_calls"),
    ]
    with upstream(lambda wire: wire.stream(events)) as behind:
        found = ask(behind, stream=True, tools=TOOLS)
    made = [one for chunk in found if chunk.choices for one in chunk.choices[0].delta.tool_calls or ()]
    assert [(one.id, json.loads(one.function.arguments)["what"]) for one in made] == [("c0", "roses"), ("c1", "tulips")]


def test_characters_that_are_cut_in_two_arrive_whole() -> None:
    """As a server sends them that cuts its text by UTF-16: half a surrogate pair at the end, half at the beginning."""
    high, low = "\ud83c", "\udf39"

    def call(arguments: str) -> dict[str, Any]:
        return delta(tool_calls=[{"index": 0, "id": "c1", "function": {"name": "water", "arguments": arguments}}])

    events = [
        *(delta(reasoning_content=f"A {high}"), delta(reasoning_content=f"{low}. ")),
        *(
            *words("For you and all of your friends: a "),
            delta(content=high),
            delta(content=low),
            *words(", is it not?"),
        ),
        *(call('{"what": "'), call(high), call(f'{low}"}}')),
        *(delta(refusal=f" No {high}"), delta(refusal=f"{low}, {low}."), delta(finish_reason="stop")),
    ]
    with upstream(lambda wire: wire.stream(events)) as behind:
        found = ask(behind, stream=True, model=behind.model(reasoning="show"), tools=TOOLS)
    deltas = [chunk.choices[0].delta for chunk in found if chunk.choices]
    assert "".join(getattr(one, "reasoning", None) or "" for one in deltas) == "A 🌹. "
    assert text_of(found) == "For you and all of your friends: a 🌹, is it not? No 🌹, \ufffd."
    assert deltas[-1].refusal == " No 🌹, \ufffd."
    [made] = [one for told_ in deltas for one in told_.tool_calls or ()]
    assert json.loads(made.function.arguments) == {"what": "🌹"}


def test_a_flagged_call_among_harmless_ones_takes_all_with_it() -> None:
    first, *_ = calls('{"what": "roses"}')
    second = delta(
        tool_calls=[{"index": 1, "id": "c2", "function": {"name": "water", "arguments": '{"a": "forbidden"}'}}]
    )
    with upstream(lambda wire: wire.stream([first, second, delta(finish_reason="tool_calls")])) as behind:
        found = ask(behind, stream=True, tools=TOOLS)
    assert text_of(found) == NOTICE
    assert "tool_calls=[" not in str(found)


@pytest.mark.parametrize("stream", [False, True])
def test_a_limit_of_tokens_holds_for_who_asks_for_none(stream: bool) -> None:
    with upstream() as behind, running({"far": behind.model()}, keys="a sk-a max_tokens=30\nb sk-b") as served:
        for key in ("sk-a", "sk-b"):
            with served.client(key) as api:
                found: Any = api.chat.completions.create(model="far", messages=ROSES, stream=stream)
                list(found)
        asked = [wire.body.get("max_tokens") for wire in behind.requests]
    assert asked == [30, None]


def test_who_asks_for_a_stricter_check_is_handed_over_to_a_model_that_checks_more() -> None:
    bad = "Then comes the forbidden part of it."
    with upstream(lambda wire: wire.stream(told(bad))) as behind:
        model = behind.model(hand_over="own", stand_in=scripted(prompt_check="all"))
        found = ask(behind, stream=True, model=model, extra_body={"tta": {"prompt_check": "user"}})
    assert text_of(found).endswith(CALM)


def test_a_refused_prompt_names_its_category() -> None:
    with upstream() as behind:
        found = ask(behind, [{"role": "user", "content": "forbidden?"}], model=behind.model(prompt_check="user"))
    assert found.model_extra["tta"]["stop_reason"] == "prompt: illicit"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("limit", [None, 300])
def test_a_long_answer_is_one_text_to_the_auditor(limit: int | None, stream: bool) -> None:
    text = " ".join(f"Rose {number} wants water." for number in range(500))
    moderator = ScriptedModerator(score=flagging("forbidden"))
    if limit:
        moderator.max_characters = limit  # type: ignore[attr-defined]
    with upstream(saying(text)) as behind:
        assert text_of(ask(behind, stream=stream, model=behind.model(moderator=moderator))) == text


def one_call(id_: str, arguments: str) -> dict[str, Any]:
    return {"index": 0, "id": id_, "type": "function", "function": {"name": "water", "arguments": arguments}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("call", "policy"),
    [
        # A server may take a call's id from what the model wrote, as vLLM does for Kimi K2.
        (one_call("functions.forbidden things:0", '{"what": "roses"}'), None),
        (one_call("do_forbidden_things", '{"what": "roses"}'), None),
        # Which of two equal keys counts is up to whoever parses them.
        (one_call("c1", r'{"what": "\u0066orbidden", "what": "roses"}'), {"threshold": 0.5, "disguises": False}),
        (one_call("c1", r'{"what": {"a": "\u0066orbidden", "a": 1}}'), {"threshold": 0.5, "disguises": False}),
    ],
    ids=["id", "id of words", "key twice", "key twice, further in"],
)
def test_all_that_a_call_says_is_judged(call: dict[str, Any], policy: Any, stream: bool) -> None:
    events = [delta(tool_calls=[call]), delta(finish_reason="tool_calls")]
    whole = completion(None, "tool_calls", tool_calls=[call])
    with upstream(lambda wire: wire.stream(events) if stream else wire.answer(whole)) as behind:
        found = ask(behind, stream=stream, model=behind.model(policy=policy), tools=TOOLS)
    assert (text_of(found), ending_of(found)[:2]) == (NOTICE, ("content_filter", "blocked"))


IDS = ["call_5fA9kQ2mZx81LpTT", "chatcmpl-tool-0f3c2e7a9b1d4c5e8f60718293a4b5c6", "functions.water:0", "a1B2c3D4e"]


@pytest.mark.parametrize("id_", IDS)
def test_an_id_that_says_nothing_is_left_as_it_is_and_not_judged(id_: str) -> None:
    events = [delta(tool_calls=[one_call(id_, '{"what": "roses"}')]), delta(finish_reason="tool_calls")]
    moderator = ScriptedModerator()
    with upstream(lambda wire: wire.stream(events)) as behind:
        found = ask(behind, stream=True, model=behind.model(moderator=moderator), tools=TOOLS)
    made = [one for chunk in found if chunk.choices for one in chunk.choices[0].delta.tool_calls or ()]
    assert [one.id for one in made] == [id_]
    assert not any(id_ in text for texts in moderator.calls for text in texts)


def test_a_refusal_is_judged_without_the_text_between_its_pieces() -> None:
    events = [delta(refusal="I shall not say forb"), *words(" and then "), delta(refusal="idden words.")]
    with upstream(lambda wire: wire.stream([*events, delta(finish_reason="stop")])) as behind:
        found = ask(behind, stream=True)
    assert "forbidden" not in str(found)
    assert ending_of(found)[:2] == ("content_filter", "blocked")
