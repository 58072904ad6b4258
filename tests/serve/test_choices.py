"""Several choices of one request: each behind a guard of its own, streamed side by side, limited and counted."""

from __future__ import annotations

import threading
from typing import Any

import anyio
import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from staged_server import BAD, CALM, NOTICE, Held, Log, Served, running, scripted
from staged_upstream import Upstream, completion, delta, told, upstream

from tta_middleware.errors import EngineError
from tta_middleware.http_api import ApiError
from tta_middleware.server.gate import Gate
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine

ROSES: Any = [{"role": "user", "content": "How do I keep roses?"}]


class ByTurns:
    """A script that gives one text after the other, call by call."""

    def __init__(self, *texts: str) -> None:
        self._texts, self._lock, self._next = texts, threading.Lock(), 0

    def __call__(self, call: ScriptedCall) -> str:
        with self._lock:
            at, self._next = self._next, self._next + 1
        return self._texts[at % len(self._texts)].removeprefix(call.prefix)


def ask(served: Served, *, n: int = 3, stream: bool = False, **options: Any) -> Any:
    options |= {"stream_options": {"include_usage": True}} if stream else {}
    with served.client() as api:
        found = api.chat.completions.create(model="roses", messages=ROSES, n=n, stream=stream, **options)
        return list(found) if stream else found


def texts_of(chunks: list[Any], n: int = 3) -> list[str]:
    """The text of each choice."""
    deltas = [choice for chunk in chunks for choice in chunk.choices]
    return ["".join(one.delta.content or "" for one in deltas if one.index == index) for index in range(n)]


def ends_of(chunks: list[Any]) -> dict[int, Any]:
    """The last chunk's choice of each."""
    return {choice.index: choice for chunk in chunks for choice in chunk.choices if choice.finish_reason}


def test_whole_choices_are_told_apart_and_the_blocked_one_alone_says_so(log: Log) -> None:
    with running(scripted(ByTurns(CALM, BAD, CALM))) as served, served.client() as api:
        raw = api.chat.completions.with_raw_response.create(model="roses", messages=ROSES, n=3)
        one = api.chat.completions.create(model="roses", messages=ROSES)
    answer = raw.parse()
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    found = sorted((choice.finish_reason, choice.message.content, choice.message.refusal) for choice in answer.choices)
    assert found == [("content_filter", NOTICE, NOTICE), ("stop", CALM, None), ("stop", CALM, None)]
    outcomes = [choice.model_extra["tta"]["outcome"] for choice in answer.choices]
    assert sorted(outcomes) == ["blocked", "clean", "clean"]
    assert "tta" not in (answer.model_extra or {})
    assert raw.headers["x-tta-outcome"] == "blocked"
    assert answer.usage is not None
    assert one.usage is not None
    assert answer.usage.prompt_tokens == one.usage.prompt_tokens
    assert answer.usage.completion_tokens > 2 * one.usage.completion_tokens
    line = log.request(outcome="blocked")
    assert (line["finish_reason"], line["completion_tokens"]) == ("content_filter", answer.usage.completion_tokens)


def test_streamed_choices_come_side_by_side() -> None:
    with running(scripted(ByTurns(CALM, BAD, CALM))) as served:
        chunks = ask(served, stream=True)
    texts, ends = texts_of(chunks), ends_of(chunks)
    [blocked] = [index for index, end in ends.items() if end.finish_reason == "content_filter"]
    assert sorted(ends) == [0, 1, 2]
    assert [text == CALM for text in texts].count(True) == 2
    assert texts[blocked].endswith(f"\n\n{NOTICE}")
    assert ends[blocked].delta.refusal == NOTICE
    assert "forbidden" not in str(chunks)
    assert {index: end.model_extra["tta"]["outcome"] for index, end in ends.items()}[blocked] == "blocked"
    said = [choice.index for chunk in chunks for choice in chunk.choices if choice.delta.content]
    assert said != sorted(said), "one choice after the other"
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 60
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_the_async_client_and_langchains(served: Served) -> None:
    async with served.aclient() as api:
        stream = await api.chat.completions.create(model="roses", messages=ROSES, n=2, stream=True)
        chunks = [chunk async for chunk in stream]
        whole = await api.chat.completions.create(model="roses", messages=ROSES, n=2)
    assert texts_of(chunks, 2) == [choice.message.content for choice in whole.choices] == [CALM, CALM]
    chat = ChatOpenAI(model="roses", base_url=f"{served.url}/v1", api_key="none", n=2)
    [generations] = (await chat.agenerate([[HumanMessage("Roses?")]])).generations
    assert [one.text for one in generations] == [CALM, CALM]


@pytest.mark.parametrize("given", [None, 5])
def test_each_choice_is_sampled_with_a_seed_of_its_own(given: int | None) -> None:
    options = {} if given is None else {"seed": given}
    with running(scripted(seed=11)) as served:
        answer = ask(served, **options)
    seeds = [choice.model_extra["tta"]["seed"] for choice in answer.choices]
    assert seeds == [(given or 11) + index for index in range(3)]


def test_inline_moderation_has_a_result_for_each() -> None:
    with running(scripted(ByTurns(CALM, BAD, CALM))) as served:
        answer = ask(served, moderation={"model": "any"})
    flagged = [result.flagged for result in answer.moderation.output.results]
    assert flagged == [choice.finish_reason == "content_filter" for choice in answer.choices]
    assert len(answer.moderation.input.results) == 1


def test_each_choice_takes_a_place_and_no_more_are_had_than_there_are(log: Log) -> None:
    held = Held(at=3)
    model = scripted(engine=ScriptedEngine(CALM, sleep=held.sleep))
    body = {"model": "roses", "messages": ROSES}
    statuses: list[int] = []

    def first() -> None:
        statuses.append(httpx.post(url, json=body | {"n": 2}, timeout=60).status_code)

    with running(model, limits={"concurrency": 3, "queue": 0, "choices": 5}, keys="alice sk-a concurrency=2") as served:
        url = f"{served.url}/v1/chat/completions"
        key = {"Authorization": "Bearer sk-a"}
        assert httpx.post(url, json=body | {"n": 3}, headers=key).json()["error"]["param"] == "n"
    with running(model, limits={"concurrency": 3, "queue": 0, "choices": 5}) as served:
        url = f"{served.url}/v1/chat/completions"
        too_many = httpx.post(url, json=body | {"n": 4})
        begun = threading.Thread(target=first)
        begun.start()
        assert held.reached.wait(30)
        busy = httpx.post(url, json=body | {"n": 2})
        held.go.set()
        begun.join(30)
        after = httpx.post(url, json=body | {"n": 3})
    assert (too_many.status_code, too_many.json()["error"]["param"]) == (400, "n")
    assert "at most 3" in too_many.json()["error"]["message"]
    assert (busy.status_code, statuses, after.status_code) == (429, [200], 200)


def test_a_model_that_breaks_ends_all_of_them() -> None:
    def breaks(call: ScriptedCall) -> str:
        raise EngineError("the script ends here")

    with running(scripted(breaks)) as served, pytest.raises(openai.InternalServerError):
        ask(served, stream=True)


def saying(*texts: str) -> Any:
    """An upstream that gives one text after the other, one choice a request."""
    left = list(texts)

    def plan(wire: Any) -> None:
        text = left.pop(0)
        assert "n" not in wire.body
        if wire.body.get("stream"):
            wire.stream([*told(text)[:-2], delta(finish_reason="stop"), told(text)[-1]])
        else:
            wire.answer(completion(text))

    return plan


@pytest.mark.parametrize("stream", [False, True])
def test_an_upstream_is_asked_for_each(stream: bool) -> None:
    with upstream(saying(CALM, BAD)) as behind:
        found, seeds = of_upstream(behind, stream)
    ends = ends_of(found) if stream else {choice.index: choice for choice in found.choices}
    assert sorted(end.finish_reason for end in ends.values()) == ["content_filter", "stop"]
    assert "forbidden" not in str(found)
    texts = texts_of(found, 2) if stream else [choice.message.content for choice in found.choices]
    assert CALM in texts
    assert [text.endswith(NOTICE) for text in texts].count(True) == 1
    assert sorted(seeds) == [5, 6]
    usage = found[-1].usage if stream else found.usage
    assert usage.prompt_tokens == 7


def of_upstream(behind: Upstream, stream: bool) -> tuple[Any, list[int]]:
    with running({"roses": behind.model()}) as served:
        found = ask(served, n=2, stream=stream, seed=5)
    return found, [wire.body["seed"] for wire in behind.requests]


class Crowd:
    """Tasks that want places, to be driven by a property test."""

    def __init__(self, places: int, queue: int) -> None:
        self.gate, self.places = Gate(places, queue, 1), places
        self.held, self.refused, self.order = 0, 0, list[int]()

    async def come(self, number: int, count: int, leaves: anyio.Event) -> None:
        try:
            async with self.gate.places(count):
                self.held += count
                self.order.append(number)
                # Fewer are held than taken where somebody was let in and has not run since.
                assert self.held <= self.gate.taken <= self.places
                try:
                    await leaves.wait()
                finally:
                    self.held -= count
        except ApiError:
            self.refused += 1


@settings(max_examples=60, deadline=None)
@given(
    places=st.integers(1, 5),
    queue=st.integers(0, 4),
    counts=st.lists(st.integers(1, 5), max_size=8),
    gives_up=st.sets(st.integers(0, 7)),
)
async def test_places_are_never_overbooked_lost_or_overtaken(
    places: int, queue: int, counts: list[int], gives_up: set[int]
) -> None:
    crowd, scopes = Crowd(places, queue), list[anyio.CancelScope]()
    leaves = [anyio.Event() for _ in counts]

    async def one(number: int, count: int) -> None:
        with anyio.CancelScope() as scope:
            scopes.append(scope)
            await crowd.come(number, count, leaves[number])

    async with anyio.create_task_group() as group:
        for number, count in enumerate(counts):
            group.start_soon(one, number, min(count, places))
            await anyio.wait_all_tasks_blocked()
        for number in sorted(gives_up & set(range(len(counts)))):
            scopes[number].cancel()
        await anyio.wait_all_tasks_blocked()
        for left in leaves:
            left.set()
    assert (crowd.gate.taken, crowd.gate.waiting) == (0, 0)
    assert crowd.order == sorted(crowd.order)
    assert len(crowd.order) + crowd.refused + len(gives_up & set(range(len(counts)))) >= len(counts)
