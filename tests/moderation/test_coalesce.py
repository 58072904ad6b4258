"""Concurrent calls in one request."""

import asyncio

import anyio
import pytest

from tta_middleware.errors import ModerationRejectedError, ModerationUnavailableError
from tta_middleware.moderation.coalesce import Coalescing, CoalescingSettings
from tta_middleware.moderation.request_size import BatchLimits, split
from tta_middleware.testing.scripted_moderator import ScriptedModerator

FOREVER = CoalescingSettings(window=3600.0, max_texts=16, max_characters=200)


async def flags(moderator: Coalescing, *texts: str, prompt: str | None = None) -> list[bool]:
    return [verdict.flagged for verdict in await moderator.moderate(texts, prompt=prompt)]


async def test_calls_of_one_moment_are_one_request_and_each_gets_its_own_verdicts():
    inner = ScriptedModerator()
    moderator = Coalescing(inner)
    answers = await asyncio.gather(
        flags(moderator, "a", "flagme b"), flags(moderator, "flagme c"), flags(moderator, "d", "e", "f")
    )
    assert answers == [[False, True], [True], [False, False, False]]
    assert inner.calls == [["a", "flagme b", "flagme c", "d", "e", "f"]]


async def test_a_full_list_leaves_before_the_window_ends():
    inner = ScriptedModerator()
    moderator = Coalescing(inner, FOREVER)
    async with anyio.create_task_group() as group:
        for index in range(9):
            group.start_soon(moderator.moderate, [f"{index} x", f"{index} y"])
        await anyio.wait_all_tasks_blocked()
        assert [len(call) for call in inner.calls] == [16]
        group.cancel_scope.cancel()


async def test_characters_bound_a_list_too():
    inner = ScriptedModerator()
    moderator = Coalescing(inner, CoalescingSettings(max_characters=100))
    await asyncio.gather(*(moderator.moderate([letter * 40]) for letter in "abcde"))
    assert [len(call) for call in inner.calls] == [2, 2, 1]


async def test_a_long_list_is_split_and_a_single_long_text_goes_alone():
    inner = ScriptedModerator()
    moderator = Coalescing(inner, CoalescingSettings(max_texts=2, max_characters=50))
    assert await flags(moderator, "a", "b", "flagme" + "x" * 60, "c") == [False, False, True, False]
    assert [len(call) for call in inner.calls] == [2, 1, 1]


async def test_an_empty_list_sends_nothing():
    inner = ScriptedModerator()
    assert await Coalescing(inner).moderate([]) == []
    assert inner.calls == []


async def test_prompts_are_kept_apart_unless_the_moderator_ignores_them():
    for reads, requests in ((True, 2), (False, 1)):
        inner = ScriptedModerator()
        moderator = Coalescing(inner, reads_prompt=reads)
        await asyncio.gather(*(moderator.moderate(["a"], prompt=prompt) for prompt in ("p", "q", "p")))
        assert len(inner.calls) == requests
    assert inner.prompts == [None]


async def test_a_cancelled_caller_takes_its_texts_along():
    inner = ScriptedModerator()
    moderator = Coalescing(inner, CoalescingSettings(window=0.05))
    calls = [asyncio.create_task(moderator.moderate([text])) for text in "abc"]
    await anyio.lowlevel.checkpoint()
    calls[0].cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    assert inner.calls == [["b", "c"]]


async def test_when_all_callers_leave_nothing_is_sent_and_nothing_is_left():
    inner = ScriptedModerator()
    moderator = Coalescing(inner, FOREVER)
    before = asyncio.all_tasks()
    calls = [asyncio.create_task(moderator.moderate([text])) for text in "abc"]
    await anyio.wait_all_tasks_blocked()
    for call in calls:
        call.cancel()
    # A caller that comes in the same moment must not be caught in the cancelled batch.
    late = asyncio.create_task(moderator.moderate(["x" * 300]))
    await asyncio.gather(*calls, return_exceptions=True)
    assert len(await late) == 1
    assert inner.calls == [["x" * 300]]
    assert asyncio.all_tasks() <= before


async def test_one_unusable_text_harms_its_own_caller_only():
    class Strict(ScriptedModerator):
        async def moderate(self, texts, *, prompt=None):
            verdicts = await super().moderate(texts, prompt=prompt)
            if "bad" in texts:
                raise ModerationRejectedError("too long", status=400)
            return verdicts

    inner = Strict()
    moderator = Coalescing(inner)
    results = await asyncio.gather(
        *(moderator.moderate([text]) for text in ("a", "bad", "flagme")), return_exceptions=True
    )
    assert not results[0][0].flagged
    assert isinstance(results[1], ModerationRejectedError)
    assert results[2][0].flagged


async def test_a_wrong_key_is_not_tried_once_per_caller():
    inner = ScriptedModerator(failures=[ModerationRejectedError("key", status=401)] * 9)
    moderator = Coalescing(inner)
    results = await asyncio.gather(*(moderator.moderate([text]) for text in "abc"), return_exceptions=True)
    assert {type(result) for result in results} == {ModerationRejectedError}
    assert len(inner.calls) == 1


async def test_everyone_in_the_list_gets_its_failure():
    inner = ScriptedModerator(failures=[ModerationUnavailableError("down", cause="status")])
    moderator = Coalescing(inner)
    results = await asyncio.gather(*(moderator.moderate([text]) for text in "abc"), return_exceptions=True)
    assert [type(result) for result in results] == [ModerationUnavailableError] * 3


async def test_loops_of_several_threads_gather_their_own_calls():
    inner = ScriptedModerator()
    moderator = Coalescing(inner, CoalescingSettings(window=0.01))

    async def work(name: int) -> list[list[bool]]:
        return await asyncio.gather(*(flags(moderator, f"flagme {name} {index}") for index in range(8)))

    answers = await asyncio.gather(*(asyncio.to_thread(asyncio.run, work(name)) for name in range(4)))
    assert answers == [[[True]] * 8] * 4
    assert all(len({text.split()[1] for text in call}) == 1 for call in inner.calls)


@pytest.mark.parametrize(
    ("texts", "groups"),
    [
        ([], []),
        (["aaaa", "b"], [["aaaa", "b"]]),
        (["aaaaaa", "b", "c", "d"], [["aaaaaa"], ["b", "c", "d"]]),
        (["a", "b", "c", "d"], [["a", "b", "c"], ["d"]]),
    ],
)
def test_texts_are_split_within_the_bounds(texts, groups):
    assert split(texts, BatchLimits(max_texts=3, max_characters=5)) == groups
