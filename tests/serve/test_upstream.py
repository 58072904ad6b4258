"""A model of another server behind the guard: what passes, what is flagged, what the other server does wrong."""

from __future__ import annotations

import itertools
import json
from itertools import repeat
from pathlib import Path
from typing import Any

import anyio
import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.messages import AIMessageChunk
from staged_server import BAD, CALM, NOTICE, Log, running, scripted
from staged_upstream import USAGE, Upstream, Wire, choice, completion, delta, saying, told, upstream, words

from tta_middleware import TTAChatModel
from tta_middleware.config import Windows
from tta_middleware.errors import ConfigurationError, ContextLengthError, ModerationUnavailableError
from tta_middleware.server.chat_request import ChatRequest
from tta_middleware.server.settings import build_models, read_server_file
from tta_middleware.server.upstream import UpstreamAnswer, UpstreamModel, UpstreamSettings
from tta_middleware.server.upstream_client import Piece
from tta_middleware.testing.auditor import AuditError, Auditor
from tta_middleware.testing.scripted_engine import ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging

ROSES: Any = [{"role": "user", "content": "How do I keep roses?"}]
TOOLS: Any = [{"type": "function", "function": {"name": "water", "parameters": {"type": "object"}}}]


def ask(behind: Upstream, messages: Any = ROSES, *, stream: bool = False, model: Any = None, **options: Any) -> Any:
    """A completion, or the chunks of one."""
    served = model or behind.model()
    with running({"far": served}) as server, server.client() as api:
        options |= {"stream_options": {"include_usage": True}} if stream else {}
        found = api.chat.completions.create(model="far", messages=messages, stream=stream, **options)
        return list(found) if stream else found


def acting(action: str) -> dict[str, Any]:
    """The settings that an action of an upstream's needs."""
    needed = {"replace": {"replacement": "Ask a gardener."}, "hand_over": {"hand_over": "own", "stand_in": scripted()}}
    return {"on_flagged": action, **needed.get(action, {})}


def text_of(found: Any) -> str:
    if not isinstance(found, list):
        return str(found.choices[0].message.content)
    return "".join(chunk.choices[0].delta.content or "" for chunk in found if chunk.choices)


def ending_of(found: Any) -> tuple[str, str, Any]:
    """Reason, outcome, usage."""
    last = next(one for one in reversed(found) if one.choices) if isinstance(found, list) else found
    usage = found[-1].usage if isinstance(found, list) else found.usage
    return last.choices[0].finish_reason, last.model_extra["tta"]["outcome"], usage


@pytest.mark.parametrize("stream", [False, True])
def test_a_clean_answer_is_handed_on(stream: bool) -> None:
    with upstream() as behind:
        found = ask(behind, stream=stream, seed=3, temperature=0.5, max_tokens=40, stop=["END"])
    assert text_of(found) == CALM
    reason, outcome, usage = ending_of(found)
    assert (reason, outcome, usage.prompt_tokens, usage.completion_tokens) == ("stop", "clean", 7, 11)
    [asked] = behind.requests
    assert {name: asked.body[name] for name in ("model", "seed", "temperature", "max_tokens", "stop")} == {
        "model": "far", "seed": 3, "temperature": 0.5, "max_tokens": 40, "stop": ["END"]
    }  # fmt: skip
    assert "moderation" not in asked.body
    assert asked.body["messages"] == ROSES
    assert bool(asked.body.get("stream")) == stream


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("action", ["block", "replace", "hand_over"])
def test_a_flagged_answer(action: str, stream: bool) -> None:
    with upstream(saying(BAD)) as behind:
        found = ask(behind, stream=stream, model=behind.model(**acting(action)))
    expected = {"block": NOTICE, "replace": "Ask a gardener.", "hand_over": CALM}[action]
    text, (reason, outcome, usage) = text_of(found), ending_of(found)
    assert "forbidden" not in text
    if stream:
        assert text.startswith("Water the roses")
        assert text.endswith(f"\n\n{expected}")
    else:
        assert text == expected
    handed = action == "hand_over"
    assert (reason, outcome) == (("stop", "clean") if handed else ("content_filter", "blocked"))
    # 11 where the upstream had told its usage by then, else a token for each word that it had said.
    spent = 11 if handed or not stream else len(words(BAD))
    assert usage.completion_tokens > spent if handed else 0 < usage.completion_tokens <= spent


@pytest.mark.parametrize("wanted", [{}, {"response_format": {"type": "json_object"}}], ids=["unasked", "asked"])
@pytest.mark.parametrize("action", ["block", "replace", "hand_over"])
def test_what_stands_in_for_the_rest_of_json_is_no_part_of_it(action: str, wanted: Any) -> None:
    written = '{"name": "a rose of the garden behind the house, and then comes the forbidden one"}'
    with upstream(saying(written)) as behind:
        found = ask(behind, stream=True, model=behind.model(**acting(action)), **wanted)
    assert written.startswith(text_of(found))
    assert len(text_of(found)) > 20
    assert ending_of(found)[:2] == ("content_filter", "blocked")
    said = [chunk.choices[0].delta.refusal for chunk in found if chunk.choices and chunk.choices[0].delta.refusal]
    assert said == ["Ask a gardener." if action == "replace" else NOTICE]


@pytest.mark.parametrize("action", ["block", "replace", "hand_over"])
def test_an_answer_that_ends_before_its_usage_counts_its_pieces(action: str) -> None:
    pieces = words(BAD)
    with upstream(lambda wire: wire.stream([*pieces, delta(finish_reason="stop")])) as behind:
        usage = ending_of(ask(behind, stream=True, model=behind.model(**acting(action))))[2]
    assert usage.completion_tokens > 0
    assert action == "hand_over" or usage.completion_tokens <= len(pieces)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_replacement_that_is_flagged_gives_way_to_the_notice() -> None:
    with upstream(saying(BAD)) as behind:
        assert text_of(ask(behind, model=behind.model(replacement="forbidden, too"))) == NOTICE


def test_a_replacement_is_judged_as_the_end_of_what_has_left() -> None:
    def score(text: str) -> dict[str, float]:
        return {"violence": float("forbidden" in text or {"roses", "gardener."} <= {*text.split()})}

    settings: Any = {"moderator": ScriptedModerator(score=score), **acting("replace")}
    with upstream(saying(BAD)) as behind:
        late = ask(behind, stream=True, model=behind.model(**settings))
        whole = ask(behind, model=behind.model(**settings))
    assert text_of(late).endswith(f"\n\n{NOTICE}")
    assert text_of(whole) == "Ask a gardener."


@pytest.mark.parametrize("last", [False, True], ids=["at once", "at its end"])
def test_another_models_answer_is_judged_as_the_end_of_what_has_left(last: bool) -> None:
    def score(text: str) -> dict[str, float]:
        return {"violence": float("forbidden" in text or {"roses", "gardener."} <= {*text.split()})}

    answer = f"{CALM.replace('roses', 'herbs') + ' ' if last else ''}Ask a gardener. And then rest."
    own = scripted(answer, moderator=ScriptedModerator(score=score))
    settings: Any = {"moderator": ScriptedModerator(score=score), "hand_over": "own", "stand_in": own}
    with upstream(saying(BAD)) as behind:
        late = ask(behind, stream=True, model=behind.model(**settings))
        whole = ask(behind, model=behind.model(**settings))
    assert "gardener" not in text_of(late)
    assert text_of(late).endswith(f"\n\n{NOTICE}")
    assert ending_of(late)[:2] == ("content_filter", "blocked")
    assert text_of(whole) == answer


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_and_other_choices_never_leave(stream: bool) -> None:
    secret = {"thinking": "forbidden", "reasoning_details": [{"text": "forbidden"}], "reasoning": ["forbidden"]}
    other = {"choices": [choice({"content": "forbidden choice"}, None, 1)]}
    events = [delta(**secret), other, *told(CALM)]
    whole = completion(CALM, **secret) | {"service_tier": "forbidden"}
    with upstream(lambda wire: wire.stream(events) if stream else wire.answer(whole)) as behind:
        found = ask(behind, stream=stream)
    assert text_of(found) == CALM
    assert "forbidden" not in str(found)


def calls(*arguments: str) -> list[Any]:
    """A stream of one call, its arguments in pieces."""
    head = delta(tool_calls=[{"index": 0, "id": "c1", "type": "function", "function": {"name": "water"}}])
    rest = [delta(tool_calls=[{"index": 0, "function": {"arguments": piece}}]) for piece in arguments]
    return [head, *rest, delta(finish_reason="tool_calls")]


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_call_is_handed_on(stream: bool) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "water", "arguments": '{"what": "roses"}'}}
    whole = completion(None, "tool_calls", tool_calls=[call])
    events = calls('{"what"', ': "roses"}')
    with upstream(lambda wire: wire.stream(events) if stream else wire.answer(whole)) as behind:
        found = ask(behind, stream=stream, tools=TOOLS)
    pieces = [one.choices[0].delta for one in found if one.choices] if stream else [found.choices[0].message]
    [made] = [call for piece in pieces for call in piece.tool_calls or ()]
    assert (made.id, made.function.name, json.loads(made.function.arguments)) == ("c1", "water", {"what": "roses"})
    assert ending_of(found)[:2] == ("tool_calls", "clean")
    assert behind.requests[0].body["tools"][0]["function"]["name"] == "water"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "arguments", ['{"what": "forbidden"}', '{"what": "\\u0066orbidden"}', '{"a":"forbidden","a":1}']
)
def test_a_flagged_tool_call_does_not_leave(arguments: str, stream: bool) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "water", "arguments": arguments}}
    whole = completion(None, "tool_calls", tool_calls=[call])
    with upstream(lambda wire: wire.stream(calls(arguments)) if stream else wire.answer(whole)) as behind:
        found = ask(behind, stream=stream, tools=TOOLS)
    assert text_of(found) == NOTICE
    assert ending_of(found)[:2] == ("content_filter", "blocked")
    assert "tool_calls=[" not in str(found)


def test_half_a_surrogate_pair_in_a_name_is_replaced_as_in_any_text() -> None:
    schema = {"name": "f", "schema": {"properties": {"\ud83c": {"description": "\ud83c"}}}}
    asked = {"model": "far", "messages": ROSES, "response_format": {"type": "json_schema", "json_schema": schema}}
    with upstream() as behind, running({"far": behind.model()}) as served:
        answer = httpx.post(f"{served.url}/v1/chat/completions", content=json.dumps(asked))
        told = behind.requests[0].body["response_format"]["json_schema"]["schema"]
    assert answer.json()["choices"][0]["message"]["content"] == CALM
    assert told == {"properties": {"\ufffd": {"description": "\ufffd"}}}


def test_a_broken_call_is_text() -> None:
    with upstream(lambda wire: wire.stream(calls('{"what": '))) as behind:
        found = ask(behind, stream=True, tools=TOOLS)
    assert (text_of(found), ending_of(found)[0]) == ('{"what": ', "stop")


def test_a_refusal_of_the_upstream_stays_one() -> None:
    with upstream(lambda wire: wire.answer(completion(None, refusal="I would rather not."))) as behind:
        found = ask(behind)
    assert found.choices[0].message.refusal == found.choices[0].message.content == "I would rather not."


REFUSED = "I would rather not, if that is all the same to you."


@pytest.mark.parametrize("begun", ["", '{"what": "'])
@pytest.mark.parametrize("release", ["window", "end"])
def test_a_refusal_in_pieces_is_no_part_of_json(begun: str, release: str) -> None:
    """The openai client's helpers parse the text once it has ended."""
    pieces = [delta(refusal=piece) for piece in (REFUSED[:20], REFUSED[20:])]
    events = [*(words(begun) if begun else ()), *pieces, delta(finish_reason="stop")]
    asked: Any = {"type": "json_object"}
    with upstream(lambda wire: wire.stream(events)) as behind:
        found = ask(behind, stream=True, model=behind.model(release=release), response_format=asked)
        plain = ask(behind, stream=True, model=behind.model(release=release))
        with running({"far": behind.model(release=release)}) as served, served.client() as api:
            response = list(api.responses.create(model="far", input="Roses?", stream=True))[-1].response
    assert text_of(found) == begun
    assert text_of(plain) == (begun or REFUSED)
    for chunks in (found, plain):
        assert [one.choices[0].delta.refusal for one in chunks if one.choices][-1] == REFUSED
    parts = [part.model_dump() for item in response.output for part in item.content]
    assert [part.get("text") or part.get("refusal") for part in parts] == [*([begun] if begun else ()), REFUSED]


@pytest.mark.parametrize("reason", ["length", "content_filter"])
def test_the_upstreams_reasons_are_carried(reason: str) -> None:
    with upstream(lambda wire: wire.stream(told("Roses", finish_reason=reason))) as behind:
        assert ending_of(ask(behind, stream=True))[:2] == (reason, "clean")


def status_of(found: Exception) -> int | None:
    return getattr(found, "status_code", None)


BREAKS: dict[str, tuple[Any, int]] = {
    "429": (lambda wire: wire.answer({"error": {"message": "secret"}}, 429, **{"retry-after": "7"}), 429),
    "500": (lambda wire: wire.answer({"error": {"message": "secret"}}, 500), 502),
    "401": (lambda wire: wire.answer({"error": {"message": "secret"}}, 401), 502),
    "400": (lambda wire: wire.answer({"error": {"message": "secret", "code": "context_length_exceeded"}}, 400), 400),
    "no json": (lambda wire: wire.answer(b"<html>secret</html>"), 502),
    "no completion": (lambda wire: wire.answer({"secret": 1}), 502),
    "no answer": (lambda wire: None, 502),
    "half a line": (lambda wire: wire.stream([b'data: {"choices": [{"secr']), 502),
    "an error in the stream": (lambda wire: wire.stream([{"error": {"message": "secret"}}]), 502),
    "no end": (lambda wire: wire.stream([delta(role="assistant")]), 502),
    "an unknown end": (lambda wire: wire.stream([delta(finish_reason="abort")]), 502),
    "slow": (lambda wire: wire.until_left(), 504),
}


WHOLE = ("429", "500", "no json", "slow")
"""Those that are tried without a stream, too."""


@pytest.mark.parametrize(("name", "stream"), [*((name, True) for name in BREAKS), *((name, False) for name in WHOLE)])
def test_what_goes_wrong_before_the_first_text_has_a_status(name: str, stream: bool, log: Log) -> None:
    plan, status = BREAKS[name]
    with upstream(plan) as behind:
        model = behind.model(timeout=0.2 if name == "slow" else 20.0)
        with pytest.raises(openai.APIStatusError) as found:
            ask(behind, stream=stream, model=model)
        asked = len(behind.requests)
    assert status_of(found.value) == status
    assert asked == (1 if name in ("401", "400", "429") else 3)
    assert "secret" not in f"{found.value} {log.lines}"
    if name == "429":
        assert found.value.response.headers["retry-after"] == "7"
    if name == "400":
        assert found.value.code == "context_length_exceeded"


@pytest.mark.parametrize("stream", [False, True])
def test_a_redirect_takes_no_prompt_to_another_server(stream: bool) -> None:
    with upstream() as other, upstream() as behind:
        behind.plan = lambda wire: wire.answer(b"", 307, location=f"{other.url}/chat/completions")
        with pytest.raises(openai.APIStatusError) as found:
            ask(behind, stream=stream)
        assert other.requests == []
    assert status_of(found.value) == 502


def test_a_second_try_before_the_first_text_is_not_noticed() -> None:
    turns = iter([BREAKS["500"][0], BREAKS["half a line"][0], saying()])
    with upstream(lambda wire: next(turns)(wire)) as behind:
        assert text_of(ask(behind, stream=True)) == CALM
        assert len(behind.requests) == 3


@pytest.mark.parametrize("end", [b'data: {"choices": [{"secr\n\n', b"", b'data: {"error": {"message": "secret"}}\n\n'])
def test_a_stream_that_breaks_after_text_ends_with_an_error_and_is_not_asked_again(end: bytes) -> None:
    with upstream(lambda wire: wire.stream([*words(CALM), end], done=False)) as behind:
        with pytest.raises(openai.APIError) as found:
            ask(behind, stream=True)
        assert len(behind.requests) == 1
    assert "secret" not in str(found.value)


def test_a_client_that_leaves_closes_the_upstreams_stream() -> None:
    with upstream() as behind:

        def talk(wire: Wire) -> None:
            wire.stream(words(CALM), done=False)
            wire.until_left()
            behind.left.set()

        behind.plan = talk
        with running({"far": behind.model()}) as served, served.client() as api:
            with api.chat.completions.create(model="far", messages=ROSES, stream=True) as stream:
                next(iter(stream))
            assert behind.left.wait(30)


@pytest.mark.parametrize("check", ["user", "all"])
def test_a_prompt_that_is_flagged_gets_the_notice(check: Any) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "water", "arguments": '{"a": "forbidden"}'}}
    turns = {
        "user": [{"role": "user", "content": "forbidden?"}],
        "all": [
            *ROSES,
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "x"},
        ],
    }
    with upstream() as behind:
        found = ask(behind, turns[check], stream=True, model=behind.model(prompt_check=check))
    assert text_of(found) == NOTICE
    assert ending_of(found)[:2] == ("content_filter", "blocked")


def test_a_client_may_ask_for_a_check_of_its_prompt() -> None:
    asked = {"model": "any", "policy": {"input": {"mode": "block"}}}
    with upstream() as behind:
        found = ask(behind, [{"role": "user", "content": "forbidden?"}], moderation=asked)
    assert text_of(found) == NOTICE


@pytest.mark.parametrize("stream", [False, True])
def test_without_a_verdict_the_notice_stands_in(stream: bool) -> None:
    with upstream() as behind:
        model = behind.model(
            moderator=ScriptedModerator(failures=repeat(ModerationUnavailableError("away"))),
            replacement="unchecked words",
        )
        found = ask(behind, stream=stream, model=model)
    assert text_of(found) == NOTICE


def test_the_key_is_sent_and_shown_to_nobody(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    monkeypatch.setenv("MY_KEY", "sk-env")
    file = tmp_path / "key"
    file.write_text("sk-one\n")
    with upstream() as behind, running(
        {"env": behind.model(api_key_env="MY_KEY"), "file": behind.model(api_key_file=file)}
    ) as served, served.client() as api:  # fmt: skip
        for name in ("env", "file"):
            api.chat.completions.create(model=name, messages=ROSES)
        file.write_text("sk-two\n")
        api.chat.completions.create(model="file", messages=ROSES)
        sent = [wire.headers["authorization"] for wire in behind.requests]
    assert sent == ["Bearer sk-env", "Bearer sk-one", "Bearer sk-two"]
    server_side = [record for record in caplog.records if "staged" not in record.pathname]
    assert not any(key in str(log.lines) for key in ("sk-env", "sk-one", "sk-two"))
    assert not any("sk-env" in record.getMessage() or "sk-one" in record.getMessage() for record in server_side)


@pytest.mark.parametrize("setting", ["api_key_env", "api_key_file"])
def test_a_key_in_place_of_where_it_stands_is_not_shown(setting: str) -> None:
    with pytest.raises(ConfigurationError, match="model 'far'") as found:
        build_models({"far": {"upstream": "http://127.0.0.1:9/v1", setting: "sk-typed"}})
    assert "sk-typed" not in str(found.value)


@pytest.mark.parametrize("stream", [False, True])
def test_a_key_that_is_gone_is_the_operators_affair(tmp_path: Path, stream: bool) -> None:
    file = tmp_path / "secret-key"
    file.write_text("sk-one\n")
    with upstream() as behind:
        model = behind.model(api_key_file=file)
        file.unlink()
        with pytest.raises(openai.InternalServerError) as found:
            ask(behind, stream=stream, model=model)
        assert not behind.requests
    assert (found.value.status_code, found.value.code) == (502, "upstream_refused")
    assert "key" not in found.value.message


@pytest.mark.parametrize(
    "table",
    [
        {"upstream": "127.0.0.1:80"},
        {"upstream": "http://a/v1", "hand_over": "nobody"},
        {"upstream": "http://a/v1", "on_flagged": "replace"},
        {"upstream": "http://a/v1", "on_flagged": "block", "replacement": "Ask a gardener."},
        {"upstream": "http://a/v1", "replacement": "Ask a gardener.", "hand_over": "own"},
        {"upstream": "http://a/v1", "api_key_env": "PATH", "api_key_file": "key"},
        {"upstream": "http://a/v1", "api_key_env": "TTA_NO_SUCH_KEY"},
        {"upstream": "http://a/v1", "temprature": 1},
        {"upstream": "http://a/v1", "moderator": "self"},
        {"upstream": "http://a/v1", "moderator": "local", "policy": {"unsafe": 0.1}},
    ],
)
def test_settings_that_cannot_be_used(table: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="far"):
        build_models({"far": table})


def test_an_upstream_in_a_settings_file(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text(
        '[models.far]\nupstream = "http://127.0.0.1:1/v1"\nhand_over = "own"\n[models.own]\nmodel = "smollm2"\n'
    )
    _, models = read_server_file(file)
    assert list(models) == ["far", "own"]
    assert models["far"].stand_in is models["own"]  # type: ignore[attr-defined]


def test_usage_is_what_the_upstream_counted() -> None:
    with upstream() as behind:
        assert ask(behind).usage.to_dict() == USAGE


@pytest.mark.no_audit("plants a leak")
@pytest.mark.parametrize("stream", [False, True])
async def test_the_auditor_hears_of_an_upstreams_leak(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def unguarded(source: Any, *args: Any, **kwargs: Any) -> Any:
        async for text in source:
            yield text

    with upstream(saying(BAD)) as behind:
        monkeypatch.setattr("tta_middleware.server.upstream.moderated", unguarded)
        model = behind.model()
        asked = ChatRequest(model="far", messages=[{"role": "user", "content": "Roses?"}])
        audit = Auditor()
        with audit:
            answer = model.answering(asked, model.policies_in_force(), None)
            if stream:
                assert [chunk async for chunk in answer.stream()]
            else:
                await answer.whole()
            with pytest.raises(AuditError, match="without a verdict"):
                audit.check()
        await model.aclose()


@pytest.mark.no_audit("plants a leak")
@pytest.mark.parametrize("action", ["block", "replace", "hand_over"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("letter", ["f", "twice"])
async def test_the_auditor_hears_of_a_letter_too_many_before_what_stands_in(
    letter: str, stream: bool, action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = UpstreamAnswer._stand_in

    async def leaking(self: UpstreamAnswer, say: Any, part: str) -> None:
        await say(AIMessageChunk(content=self.said[-1:] or "t" if letter == "twice" else letter))
        await honest(self, say, part)

    async def ask(behind: Upstream) -> str:
        model = behind.model(**acting(action))
        asked = ChatRequest(model="far", messages=ROSES)
        answer = model.answering(asked, model.policies_in_force(), None)
        found = "".join([one.text async for one in answer.stream()]) if stream else (await answer.whole()).text
        await model.aclose()
        return found

    with upstream(saying(BAD)) as behind:
        with Auditor():
            said = await ask(behind)
        monkeypatch.setattr(UpstreamAnswer, "_stand_in", leaking)
        with pytest.raises(AuditError, match="something else left"), Auditor():
            assert len(await ask(behind)) > len(said)


class Cut:
    """In a client's place: a text in pieces, cut wherever it may be."""

    def __init__(self, text: str, cuts: set[int]) -> None:
        edges = [0, *sorted(cuts), len(text)]
        self._pieces = [text[begin:end] for begin, end in itertools.pairwise(edges)]

    async def ask(self, body: Any, *, stream: bool) -> Any:
        for piece in self._pieces:
            yield Piece(text=piece)
        yield Piece(reason="stop", usage=(1, 1))

    async def aclose(self) -> None: ...


@given(st.sets(st.integers(0, len(BAD))), st.sampled_from([BAD, CALM * 3]))
@settings(max_examples=15)
def test_however_an_upstream_cuts_its_text_the_same_leaves(cuts: set[int], text: str) -> None:
    async def said(client: Cut) -> tuple[str, str]:
        given_ = {"moderator": ScriptedModerator(score=flagging("forbidden"), default_threshold=0.5)}
        model = UpstreamModel(
            UpstreamSettings(upstream="http://far/v1", windows=Windows(first=24, largest=48), **given_)
        )
        model.client = client  # type: ignore[assignment]
        asked = ChatRequest(model="far", messages=[{"role": "user", "content": "Roses?"}])
        answer = model.answering(asked, model.policies_in_force(), None)
        chunks = [chunk async for chunk in answer.stream()]
        return "".join(str(chunk.text) for chunk in chunks), chunks[-1].response_metadata["tta"]["outcome"]

    cut, whole = anyio.run(said, Cut(text, cuts)), anyio.run(said, Cut(text, set()))
    assert cut == whole
    assert "forbidden" not in cut[0]


class ReadsLittle(ScriptedEngine):
    async def embed(self, *args: Any, **kwargs: Any) -> Any:
        raise ContextLengthError("too long")


@pytest.mark.parametrize("stream", [False, True])
def test_where_the_other_model_reads_less_at_once_the_notice_stands(stream: bool) -> None:
    little = TTAChatModel(model=ReadsLittle(CALM), moderator=ScriptedModerator())
    with upstream(saying(BAD)) as behind:
        found = ask(behind, stream=stream, model=behind.model(hand_over="own", stand_in=little))
    assert text_of(found).endswith(NOTICE)
    assert ending_of(found)[:2] == ("content_filter", "blocked")
