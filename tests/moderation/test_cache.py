"""The verdict cache and single-flight."""

import asyncio
import gc
import pickle

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tta_middleware.errors import InvalidVerdictError, ModerationUnavailableError
from tta_middleware.moderation.adapters.runnable import RunnableModerator
from tta_middleware.moderation.cache import Cached, CacheSettings, VerdictCache
from tta_middleware.testing.scripted_moderator import ScriptedModerator
from tta_middleware.testing.virtual_time import ManualClock
from tta_middleware.types import Verdict

SECRET_TEXT = "the quick brown fox 7741"


def small(entries: int = 2, ttl: float = 10.0) -> tuple[VerdictCache, ManualClock]:
    clock = ManualClock()
    return VerdictCache(CacheSettings(entries=entries, ttl=ttl), clock=clock), clock


async def test_a_known_text_is_not_asked_for_again():
    inner = ScriptedModerator()
    moderator = Cached(inner)
    await moderator.moderate(["a", "b"])
    verdicts = await moderator.moderate(["b", "flagme", "a", "b"])
    assert [verdict.flagged for verdict in verdicts] == [False, True, False, False]
    assert inner.calls == [["a", "b"], ["flagme"]]


async def test_equal_texts_of_one_list_are_sent_once():
    inner = ScriptedModerator()
    assert len(await Cached(inner).moderate(["a", "a", "b", "a"])) == 4
    assert inner.calls == [["a", "b"]]


async def test_an_old_verdict_is_fetched_anew():
    cache, clock = small(ttl=10.0)
    inner = ScriptedModerator()
    moderator = Cached(inner, cache)
    await moderator.moderate(["a"])
    clock.now = 9.9
    await moderator.moderate(["a"])
    clock.now = 10.0
    await moderator.moderate(["a"])
    assert inner.calls == [["a"], ["a"]]


async def test_the_verdict_unused_for_longest_goes_first():
    cache, _ = small(entries=2)
    inner = ScriptedModerator()
    moderator = Cached(inner, cache)
    for text in ["a", "b", "a", "c", "a", "b"]:
        await moderator.moderate([text])
    assert inner.calls == [["a"], ["b"], ["c"], ["b"]]
    assert len(cache) == 2


async def test_prompts_tell_verdicts_apart_unless_the_moderator_ignores_them():
    reading, ignoring = ScriptedModerator(), ScriptedModerator()
    for inner, reads in ((reading, True), (ignoring, False)):
        moderator = Cached(inner, reads_prompt=reads)
        for prompt in (None, "", "p", "p"):
            await moderator.moderate(["a"], prompt=prompt)
    assert len(reading.calls) == 3
    assert len(ignoring.calls) == 1


@given(st.lists(st.tuples(st.text(max_size=5), st.none() | st.text(max_size=5), st.text(max_size=5)), max_size=20))
def test_different_questions_have_different_keys(questions):
    cache = VerdictCache()
    assert len({cache.key(*reordered(question)) for question in questions}) == len(set(questions))


def reordered(question: tuple[str, str | None, str]) -> tuple[str, str, str | None]:
    name, prompt, text = question
    return name, text, prompt


async def test_no_text_is_kept_in_the_cache():
    cache = VerdictCache()
    await Cached(ScriptedModerator(), cache).moderate([SECRET_TEXT], prompt=SECRET_TEXT)
    kept = pickle.dumps(dict(cache._entries))
    assert SECRET_TEXT.encode() not in kept
    # The digest is keyed by the process: another process cannot test guesses against it.
    assert cache.key("m", "a", None) != VerdictCache().key("m", "a", None)


async def test_errors_are_not_kept():
    inner = ScriptedModerator(failures=[ModerationUnavailableError("down", cause="status")])
    moderator = Cached(inner)
    with pytest.raises(ModerationUnavailableError):
        await moderator.moderate(["a"])
    assert len(await moderator.moderate(["a"])) == 1


async def test_a_moderator_that_drops_a_verdict_is_caught():
    class Forgetful(ScriptedModerator):
        async def moderate(self, texts, *, prompt=None) -> list[Verdict]:
            return (await super().moderate(texts, prompt=prompt))[:-1]

    with pytest.raises(InvalidVerdictError, match="1 verdicts for 2 texts"):
        await Cached(Forgetful()).moderate(["a", "b"])


async def test_equal_texts_on_their_way_share_one_call():
    gate = anyio.Event()
    inner = ScriptedModerator(gate=gate.wait)
    moderator = Cached(inner)
    calls = [asyncio.create_task(moderator.moderate(["a", "flagme"])) for _ in range(20)]
    late = asyncio.create_task(moderator.moderate(["flagme", "b"]))
    await anyio.wait_all_tasks_blocked()
    gate.set()
    for verdicts in await asyncio.gather(*calls):
        assert [verdict.flagged for verdict in verdicts] == [False, True]
    assert [verdict.flagged for verdict in await late] == [True, False]
    assert inner.calls == [["a", "flagme"], ["b"]]


async def test_all_who_wait_get_the_error_and_the_next_one_asks_again():
    gate = anyio.Event()
    inner = ScriptedModerator(failures=[ModerationUnavailableError("down", cause="status")], gate=gate.wait)
    moderator = Cached(inner)
    calls = [asyncio.create_task(moderator.moderate(["a"])) for _ in range(5)]
    await anyio.wait_all_tasks_blocked()
    gate.set()
    errors = await asyncio.gather(*calls, return_exceptions=True)
    assert [(type(error), error.cause) for error in errors] == [(ModerationUnavailableError, "status")] * 5
    assert len({id(error) for error in errors}) == 5
    assert len(await moderator.moderate(["a"])) == 1


class OfTheirOwn(ModerationUnavailableError):
    """Its constructor takes something else than what it keeps."""

    def __init__(self, code: int, words: str) -> None:
        super().__init__(f"{code}: {words}", cause="status", retry_after=2.0)


async def test_an_error_of_any_kind_reaches_who_shared_the_call():
    async def moderate(texts, *, prompt=None):
        raise OfTheirOwn(503, "down")

    inner = ScriptedModerator()
    inner.moderate = moderate
    with pytest.raises(OfTheirOwn, match="503: down") as raised:
        await Cached(inner).moderate(["a"])
    assert (raised.value.cause, raised.value.retry_after) == ("status", 2.0)


async def test_what_a_shared_call_raised_unheard_is_not_printed_with_its_text():
    told: list[dict] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: told.append(context))
    gate = anyio.Event()

    async def broken(text: str) -> float:
        try:
            await gate.wait()
        finally:
            raise RuntimeError(f"cannot read {text!r}")

    moderator = Cached(RunnableModerator(broken))
    texts = [f"{SECRET_TEXT} {at}" for at in range(2)]
    askers = [asyncio.create_task(moderator.moderate([text])) for text in texts]
    await anyio.wait_all_tasks_blocked()
    both = asyncio.create_task(moderator.moderate(texts))  # hears of the first one's error alone
    alone = asyncio.create_task(moderator.moderate(["another"]))
    await anyio.wait_all_tasks_blocked()
    for call in (*askers, alone):
        call.cancel()
    await asyncio.gather(*askers, alone, return_exceptions=True)
    gate.set()
    await asyncio.gather(both, return_exceptions=True)
    del askers, both, alone, call
    gc.collect()
    assert told == []


async def test_the_first_asker_may_leave_without_harm_to_the_others():
    gate = anyio.Event()
    inner = ScriptedModerator(gate=gate.wait)
    moderator = Cached(inner)
    first = asyncio.create_task(moderator.moderate(["a"]))
    await anyio.wait_all_tasks_blocked()
    others = [asyncio.create_task(moderator.moderate(["a"])) for _ in range(3)]
    await anyio.wait_all_tasks_blocked()
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    gate.set()
    assert len(await asyncio.gather(*others)) == 3
    assert inner.calls == [["a"]]


async def test_when_the_last_asker_leaves_the_call_ends_with_it():
    inner = ScriptedModerator(gate=anyio.sleep_forever)
    moderator = Cached(inner)
    before = asyncio.all_tasks()
    calls = [asyncio.create_task(moderator.moderate(["a", str(index)])) for index in range(10)]
    await anyio.wait_all_tasks_blocked()
    assert inner.in_flight == 10
    for call in calls:
        call.cancel()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)
    assert inner.in_flight == 0
    assert asyncio.all_tasks() <= before


async def test_a_text_whose_askers_left_can_be_asked_for_again_at_once():
    gates = iter([anyio.sleep_forever, anyio.lowlevel.checkpoint])
    moderator = Cached(ScriptedModerator(gate=lambda: next(gates)()))
    first = asyncio.create_task(moderator.moderate(["a"]))
    await anyio.wait_all_tasks_blocked()
    first.cancel()
    # One step: the call has been told to end and has not ended.
    await anyio.lowlevel.checkpoint()
    assert len(await moderator.moderate(["a"])) == 1
    await asyncio.gather(first, return_exceptions=True)


async def test_one_callers_short_deadline_does_not_end_the_call_of_another():
    gate = anyio.Event()
    inner = ScriptedModerator(gate=gate.wait)
    moderator = Cached(inner)

    async def hurried() -> bool:
        with anyio.move_on_after(0.05) as scope:
            await moderator.moderate(["a"])
        return scope.cancelled_caught

    hurry = asyncio.create_task(hurried())
    while not inner.calls:
        await anyio.lowlevel.checkpoint()
    patient = asyncio.create_task(moderator.moderate(["a"]))
    assert await hurry
    gate.set()
    assert len(await patient) == 1
    assert inner.calls == [["a"]]


async def test_the_callers_deadline_reaches_the_shared_call():
    seen: list[float] = []

    async def look() -> None:
        seen.append(anyio.current_effective_deadline() - anyio.current_time())

    with anyio.fail_after(5.0):
        await Cached(ScriptedModerator(gate=look)).moderate(["a"])
    assert 0.0 < seen[0] <= 5.0


def test_loops_share_verdicts_and_loops_that_ended_are_forgotten():
    inner = ScriptedModerator()
    moderator = Cached(inner)
    for _ in range(3):
        asyncio.run(moderator.moderate(["a"]))
    assert inner.calls == [["a"]]
    gc.collect()
    assert len(moderator._flights) == 0
