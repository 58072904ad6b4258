"""A conformance suite for moderators.

    class TestMyModerator(ModeratorContract):
        harmful = "..."

        @pytest.fixture
        async def moderator(self):
            async with MyModerator() as moderator:
                yield moderator

The tests are coroutines: run them with pytest-asyncio in ``auto`` mode.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

import pytest

from tta_middleware.errors import ModerationError
from tta_middleware.protocols import Moderator
from tta_middleware.types import Verdict


class ModeratorContract:
    """What every moderator must do; subclass it and give the fixture ``moderator``.

    Attributes:
        harmless: a text below the moderator's default threshold.
        harmful: a text at or above it.
    """

    harmless: str = "The library opens at nine and closes at six."
    harmful: str

    @pytest.fixture
    def broken_moderator(self) -> Moderator:
        """A moderator whose server cannot be used; give it to have the error tests run."""
        pytest.skip("no broken_moderator fixture")

    def test_it_has_a_name_and_a_threshold(self, moderator: Moderator) -> None:
        assert isinstance(moderator, Moderator)
        assert moderator.name
        assert 0.0 < moderator.default_threshold <= 1.0

    async def test_one_verdict_per_text_in_order(self, moderator: Moderator) -> None:
        texts = [self.harmless, self.harmful, self.harmless]
        flagged = _flagged(moderator, await moderator.moderate(texts))
        assert flagged == [False, True, False]

    async def test_scores_are_numbers_in_their_range(self, moderator: Moderator) -> None:
        for verdict in await moderator.moderate([self.harmless, self.harmful]):
            assert verdict.scores
            assert all(math.isfinite(score) and 0.0 <= score <= 1.0 for score in verdict.scores.values())
            assert verdict.model

    async def test_no_texts_no_verdicts(self, moderator: Moderator) -> None:
        assert await moderator.moderate([]) == []

    async def test_a_prompt_may_be_given(self, moderator: Moderator) -> None:
        assert len(await moderator.moderate([self.harmless], prompt="When is the library open?")) == 1

    async def test_unusual_texts_get_a_verdict(self, moderator: Moderator) -> None:
        texts = ["", " \n", "a", "e\u0301 \u4f60\u597d \U0001f600 \u0000", "\ud800", "word " * 3000]
        assert len(await moderator.moderate(texts)) == len(texts)

    async def test_the_callers_list_is_left_as_it_is(self, moderator: Moderator) -> None:
        texts = [self.harmless, self.harmful]
        await moderator.moderate(texts)
        assert texts == [self.harmless, self.harmful]

    async def test_a_tuple_is_a_sequence_too(self, moderator: Moderator) -> None:
        assert len(await moderator.moderate((self.harmless, self.harmful))) == 2

    async def test_concurrent_calls_keep_their_verdicts_apart(self, moderator: Moderator) -> None:
        texts = [self.harmful if index % 3 == 0 else f"{self.harmless} ({index})" for index in range(24)]
        answers = await asyncio.gather(*(moderator.moderate([text]) for text in texts))
        flagged = [_flagged(moderator, verdicts)[0] for verdicts in answers]
        assert flagged == [index % 3 == 0 for index in range(24)]

    async def test_it_works_in_another_event_loop_at_the_same_time(self, moderator: Moderator) -> None:
        async def ask() -> list[bool]:
            return _flagged(moderator, await moderator.moderate([self.harmful, self.harmless]))

        here, there = await asyncio.gather(ask(), asyncio.to_thread(asyncio.run, ask()))
        assert here == there == [True, False]

    async def test_it_serves_one_loop_after_the_other(self, moderator: Moderator) -> None:
        for _ in range(2):
            verdicts = await asyncio.to_thread(asyncio.run, moderator.moderate([self.harmful]))
            assert _flagged(moderator, verdicts) == [True]

    async def test_a_cancelled_call_leaves_no_task(self, moderator: Moderator) -> None:
        await moderator.moderate([self.harmless])
        before = asyncio.all_tasks()
        call = asyncio.create_task(moderator.moderate([f"{self.harmless} Cancelled."]))
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        assert asyncio.all_tasks() <= before

    async def test_closing_twice_does_no_harm(self, moderator: Moderator) -> None:
        await moderator.moderate([self.harmless])
        await moderator.aclose()
        await moderator.aclose()

    async def test_a_failure_is_a_moderation_error_without_the_text(self, broken_moderator: Moderator) -> None:
        words = "the quick brown fox 7741"
        with pytest.raises(ModerationError) as caught:
            await broken_moderator.moderate([words], prompt=words)
        assert words not in str(caught.value)
        await broken_moderator.aclose()


def _flagged(moderator: Moderator, verdicts: Sequence[Verdict]) -> list[bool]:
    return [verdict.score >= moderator.default_threshold for verdict in verdicts]
