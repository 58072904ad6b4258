"""Texts beyond a moderator's limit go as parts that overlap, whoever asks and in whatever way."""

import json
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tta_middleware import Guard, Message, Policy, Repair
from tta_middleware.errors import ConfigurationError, ModerationRejectedError
from tta_middleware.guard.ledger import Ledger
from tta_middleware.guard.moderated import moderated
from tta_middleware.moderation.adapters.azure import AzureContentSafetyModerator
from tta_middleware.moderation.adapters.chat_guard import ChatGuardModerator
from tta_middleware.moderation.adapters.guard_formats import LLAMA_GUARD
from tta_middleware.moderation.adapters.mistral import MistralModerator
from tta_middleware.moderation.adapters.runnable import RunnableModerator
from tta_middleware.moderation.cache import Cached
from tta_middleware.moderation.coalesce import Coalescing
from tta_middleware.moderation.ensemble import Ensemble
from tta_middleware.moderation.fallback import WithFallback
from tta_middleware.moderation.openai import OpenAIModerator
from tta_middleware.moderation.parts import InParts
from tta_middleware.moderation.stack import StackSettings, production_moderator
from tta_middleware.policy.verdicts import OVERLAP, parts, verdicts_on
from tta_middleware.testing.fault_server import FaultServer
from tta_middleware.testing.scripted_engine import ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging
from tta_middleware.types import Sampling

FILLER = "The shed stands behind the house and holds two spades. "
LONG = FILLER * 130
"""7,150 characters."""

FLAGGED = LONG[:5990] + " forbidden " + LONG[5990:]
"""The word lies across the service's limit."""


class Small(ScriptedModerator):
    """A service that refuses texts above 6,000 characters, and says so."""

    max_characters = 6_000

    def __init__(self) -> None:
        super().__init__(score=flagging("forbidden"))

    async def moderate(self, texts, *, prompt=None):
        if any(len(text) > 6_000 for text in texts):
            raise ModerationRejectedError("too long", status=400)
        return await super().moderate(texts, prompt=prompt)


@given(st.integers(1, 400), st.integers(2, 60), st.integers(0, 60), st.data())
def test_a_phrase_as_long_as_the_overlap_lies_whole_within_a_part(length, limit, overlap, data):
    text = "".join(map(chr, range(0x4E00, 0x4E00 + length)))
    cut = parts(text, limit, overlap)
    shared = min(overlap, limit // 2)
    start = data.draw(st.integers(0, length - 1))
    assert any(text[start : start + max(shared, 1)] in part for part in cut)
    assert all(len(part) <= limit for part in cut)
    assert len(cut) <= max(1, -(-length // (limit - shared)))


@given(st.text(max_size=300), st.text(max_size=100), st.integers(1, 50))
def test_the_parts_of_a_text_that_grows_stay_the_same(text, more, limit):
    before, after = parts(text, limit), parts(text + more, limit)
    assert before[:-1] == after[: len(before) - 1]
    assert after[len(before) - 1].startswith(before[-1])


def test_the_usual_overlap_sees_a_long_paragraph_whole():
    text = "a" * 50_000
    assert len(parts(text, 4_000)) == 17
    assert min(OVERLAP, 4_000 // 4) == 1_000


async def test_parts_go_in_one_request_with_the_other_texts():
    inner = Small()
    verdicts = await verdicts_on(inner, ["short", FLAGGED, LONG, "forbidden"])
    assert [verdict.flagged for verdict in verdicts] == [False, True, False, True]
    assert [len(call) for call in inner.calls] == [6]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda inner: inner,
        Cached,
        Coalescing,
        lambda inner: Cached(Coalescing(inner)),
        lambda inner: Ensemble([ScriptedModerator(score=flagging("forbidden")), inner]),
        lambda inner: WithFallback(inner, ScriptedModerator()),
    ],
    ids=["plain", "cache", "coalescing", "both", "ensemble", "fallback"],
)
@pytest.mark.parametrize(("text", "flagged"), [(LONG, False), (FLAGGED, True)], ids=["clean", "flagged"])
async def test_no_layer_lets_a_long_text_through_uncut(wrap, text, flagged):
    assert (await verdicts_on(wrap(Small()), [text]))[0].flagged is flagged


async def test_a_whole_answer_that_grew_is_asked_for_by_its_new_parts_only():
    inner = Small()
    moderator = Cached(inner)
    for end in (7_000, 12_000, 20_000, 30_000):
        await verdicts_on(moderator, ["".join(f"{n:05d}" for n in range(6_000))[:end]])
    asked = sum(len(text) for call in inner.calls for text in call)
    assert asked < 2 * 30_000


WAYS = ["invoke", "stream", "end"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("text", "outcome"), [(LONG, "clean"), (FLAGGED, "blocked")], ids=["clean", "flagged"])
async def test_all_ways_to_answer_decide_alike(way, text, outcome):
    guard = Guard(ScriptedEngine(lambda _call: text), Small(), repair=Repair(method=None), prompt_check="all")
    conversation, whole = [Message("user", LONG)], Sampling(max_new_tokens=4_000)
    if way == "invoke":
        answer = await guard.answer(conversation, whole)
    else:
        release = "window" if way == "stream" else "end"
        events = [event async for event in guard.stream(conversation, whole, release=release)]
        answer = events[-1].answer
    assert answer.trace.outcome == outcome
    assert "forbidden" not in answer.text
    assert outcome == "blocked" or answer.text.strip() == text.strip()


@pytest.mark.parametrize("hold", [False, True], ids=["windows", "held"])
async def test_a_stream_of_another_model_is_cut_alike(hold):
    async def source():
        yield LONG

    pieces = [piece async for piece in moderated(source(), Small(), Policy(threshold=0.5), hold=hold)]
    assert "".join(pieces) == LONG


async def test_an_agents_texts_are_cut_to_what_its_moderator_takes():
    ledger = Ledger(Small(), Policy(threshold=0.5))
    assert await ledger.passes([LONG])
    assert not await ledger.passes([FLAGGED])
    assert ledger.error is None


async def test_a_moderator_without_a_limit_gets_whole_texts_unless_it_is_given_one():
    inner = ScriptedModerator(score=flagging("forbidden"))
    assert (await verdicts_on(inner, [FLAGGED]))[0].flagged
    assert inner.calls == [[FLAGGED]]
    limited = InParts(inner, 100, overlap=20)
    assert (await verdicts_on(limited, [FLAGGED]))[0].flagged
    assert (await limited.moderate([FLAGGED]))[0].flagged
    assert max(map(len, inner.calls[-1])) == 100


@pytest.mark.parametrize("limits", [{"max_characters": 0}, {"max_characters": 10, "overlap": 6}])
def test_unusable_limits_are_refused(limits):
    with pytest.raises(ConfigurationError):
        InParts(ScriptedModerator(), **limits)


@pytest.mark.parametrize(
    "make",
    [
        lambda url: OpenAIModerator(base_url=url, api_key="k"),
        lambda url: production_moderator(StackSettings(base_url=url), api_key="k"),
    ],
    ids=["openai", "stack"],
)
async def test_the_api_gets_parts_in_one_list(make):
    async with FaultServer() as server, make(server.base_url) as moderator:
        verdicts = await moderator.moderate([FILLER, LONG[:3_999] + "flagme" + LONG])
    assert [verdict.flagged for verdict in verdicts] == [False, True]
    (request,) = server.requests
    assert max(map(len, request.texts)) == 4_000


def test_every_adapter_of_a_service_declares_its_limit():
    azure = AzureContentSafetyModerator("https://a.example")
    llama = ChatGuardModerator("llama-guard", LLAMA_GUARD, base_url="http://127.0.0.1:1/v1", max_characters=3_000)
    found = [one.max_characters for one in (OpenAIModerator(), azure, MistralModerator(), llama)]
    assert found == [4_000, 10_000, 4_000, 3_000]


async def test_half_a_surrogate_pair_crashes_no_moderators_request():
    async def posts(text: str, prompt: str | None) -> float:
        body = json.dumps({"text": text, "prompt": prompt}, ensure_ascii=False).encode()
        return 0.9 if b"forbidden" in body else 0.1

    moderator = RunnableModerator(posts)
    ask = partial(verdicts_on, moderator, prompt="a \udc00 question")
    assert [verdict.score for verdict in await ask(["\ud83d broken", "\ud83d forbidden", "fine"])] == [0.1, 0.9, 0.1]


async def test_half_a_surrogate_pair_is_checked_in_a_stream():
    async def posts(text: str, prompt: str | None) -> float:
        return len(json.dumps(text, ensure_ascii=False).encode()) / 1_000

    async def source():
        yield "A kind answer \ud83d here."

    assert [piece async for piece in moderated(source(), RunnableModerator(posts))] == ["A kind answer \ud83d here."]


async def test_a_whole_pair_in_two_halves_is_joined():
    inner = ScriptedModerator()
    await verdicts_on(inner, ["\ud83d\ude00 and \ude00"])
    assert inner.calls == [["\U0001f600 and \ufffd"]]
