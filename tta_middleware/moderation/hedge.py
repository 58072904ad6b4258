"""Hedged requests: when an answer takes longer than usual, ask once more and take whichever comes first.

Source: J. Dean and L. A. Barroso, "The Tail at Scale", CACM 56(2), 2013.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated

import anyio
from pydantic import Field, PositiveInt

from tta_middleware.aio import process as _process
from tta_middleware.aio.streams import first_error
from tta_middleware.config import Settings
from tta_middleware.errors import ModerationError
from tta_middleware.moderation.wrapper import Wrapper
from tta_middleware.policy.verdicts import verdicts_on
from tta_middleware.protocols import Moderator
from tta_middleware.types import Verdict


class HedgeSettings(Settings):
    """When a second request is sent.

    Attributes:
        quantile: of the last latencies; a call that takes longer is hedged.
        samples: latencies that are remembered.
        minimum_samples: no hedging before that many were seen.
    """

    quantile: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.95
    samples: PositiveInt = 200
    minimum_samples: PositiveInt = 20


class Latencies:
    """The last latencies of successful calls, in seconds; shared by all threads."""

    def __init__(self, settings: HedgeSettings) -> None:
        self._settings = settings
        self._lock = _process.Lock()
        self._seen: deque[float] = deque(maxlen=settings.samples)

    def add(self, seconds: float) -> None:
        with self._lock:
            self._seen.append(seconds)

    def delay(self) -> float | None:
        """Seconds to wait before a second request; None while too little is known."""
        with self._lock:
            ordered = sorted(self._seen)
        if len(ordered) < self._settings.minimum_samples:
            return None
        return ordered[min(len(ordered) - 1, int(self._settings.quantile * len(ordered)))]


class Hedged(Wrapper):
    """A moderator that is asked a second time when it is slow; the slower request is cancelled.

    Args:
        admit: entered with the texts before a second request is sent and left when it has ended; False does without
            it. Give it ``Limiter.try_admit``, so that hedges never queue and take one of the slots in flight.
    """

    def __init__(
        self,
        inner: Moderator,
        settings: HedgeSettings | None = None,
        *,
        admit: Callable[[Sequence[str]], AbstractContextManager[bool]] = lambda _texts: nullcontext(True),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(inner)
        self._latencies = Latencies(settings or HedgeSettings())
        self._admit = admit
        self._clock = clock

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        """As the inner moderator; an error is raised when no request is left that could still succeed."""
        wait = self._latencies.delay()
        if wait is None:
            return await self._timed(texts, prompt)
        race = _Race()
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(race.run, lambda: self._timed(texts, prompt), group.cancel_scope)
                with anyio.move_on_after(wait):
                    await race.over.wait()
                if not race.over.is_set():
                    with self._admit(texts) as admitted:
                        if admitted:
                            race.running += 1
                            await race.run(lambda: self._timed(texts, prompt), group.cancel_scope)
        except BaseExceptionGroup as errors:
            raise first_error(errors) from None
        return race.result()

    async def _timed(self, texts: Sequence[str], prompt: str | None) -> list[Verdict]:
        started = self._clock()
        verdicts = await verdicts_on(self._inner, texts, prompt=prompt)
        self._latencies.add(self._clock() - started)
        return verdicts


class _Race:
    """One or two runs of the same call; the first success ends it, or the last failure."""

    def __init__(self) -> None:
        self.running = 1
        self.over = anyio.Event()
        self._outcome: list[Verdict] | ModerationError | None = None

    async def run(self, call: Callable[[], Awaitable[list[Verdict]]], scope: anyio.CancelScope) -> None:
        try:
            self._outcome = await call()
            self.running = 0
        except ModerationError as error:
            # A success that came first stands.
            self._outcome = error if self._outcome is None else self._outcome
            self.running -= 1
        if self.running <= 0:
            self.over.set()
            scope.cancel()

    def result(self) -> list[Verdict]:
        if isinstance(self._outcome, ModerationError):
            raise self._outcome
        if self._outcome is None:
            raise ModerationError("a hedged call ended without an outcome")
        return self._outcome
