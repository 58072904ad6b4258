"""A moderator whose calls take unequally long, so that what waits for the wrong one shows."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from anyio.lowlevel import checkpoint

from tta_middleware.moderation.wrapper import Wrapper
from tta_middleware.protocols import Moderator
from tta_middleware.types import Verdict

T = TypeVar("T")

LONG = 60
"""Turns that outlast some sixty steps of a scripted engine."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a moderator: its number from 0 on, and what it was asked.

    A guard's prompt check has no ``prompt``; the checks of its answer have.
    """

    number: int
    texts: tuple[str, ...]
    prompt: str | None


async def turns(count: int) -> None:
    """Let the other tasks of the event loop run ``count`` times; no clock is asked."""
    for _ in range(count):
        await checkpoint()


class Unequal(Wrapper):
    """Answers as ``inner`` does, each call after as many turns of the event loop as ``delay`` says.

    Attributes:
        calls: what was asked, in order.
        answered: numbers of the calls in the order in which they were answered.
    """

    def __init__(self, inner: Moderator, delay: Callable[[Call], int]) -> None:
        super().__init__(inner)
        self._delay = delay
        self.calls: list[Call] = []
        self.answered: list[int] = []

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        call = Call(len(self.calls), tuple(texts), prompt)
        self.calls.append(call)
        await turns(self._delay(call))
        try:
            return await self._inner.moderate(texts, prompt=prompt)
        finally:
            self.answered.append(call.number)


def slow_prompt(call: Call) -> int:
    """The prompt check takes longer than the checks of the answer."""
    return LONG if call.prompt is None else 1


def slow_first(call: Call) -> int:
    """The first check of each kind takes longer than those after it."""
    return LONG if call.number == 0 else 1


def slow_even(call: Call) -> int:
    """Every other check is overtaken by the one after it."""
    return LONG // 2 if call.number % 2 == 0 else 1


UNEQUAL: dict[str, Callable[[Call], int]] = {
    "slow prompt check": slow_prompt,
    "slow first window": slow_first,
    "checks overtake each other": slow_even,
}
"""The delays that tests of concurrency run with, by name."""


async def slowly(items: AsyncIterable[T], count: int = LONG) -> AsyncIterator[T]:
    """A consumer that is slower than the moderator: ``count`` turns before each item is asked for."""
    async for item in items:
        yield item
        await turns(count)
