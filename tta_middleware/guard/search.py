"""The search loop: ask, decode under watch, judge, tell; counts what it spends and keeps the best checked answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import anyio

from tta_middleware.aio.streams import sole
from tta_middleware.errors import ModerationError
from tta_middleware.guard.attempt import Attempt, Delivery, Meter, Parts, Question, attempts
from tta_middleware.protocols import Optimiser
from tta_middleware.types import Candidate, Completion, Proposal, StepTrace

OnStep: TypeAlias = Callable[[StepTrace], Awaitable[None]]

LATE_FLAG = "late flag"


@dataclass(frozen=True, slots=True, eq=False)
class SearchResult:
    """What a search found.

    Attributes:
        winner: a safe and usable answer with its verdict, or None.
        best: the best answer that may be given out: usable ones first, then safe ones, then the lowest loss.
        unscored: a usable answer that could not be scored and where it came from, if the repair policy lets such pass.
        stop_reason: ``neutralised``, ``optimiser: ...``, ``budget: ...``, ``moderator: ...``, or ``late flag``: part of
            a candidate has left that was chosen and then flagged.
    """

    winner: Candidate | None
    best: Candidate | None
    steps: tuple[StepTrace, ...]
    stop_reason: str
    unscored: tuple[Proposal, Completion] | None = None


async def search(
    parts: Parts,
    question: Question,
    optimiser: Optimiser,
    meter: Meter,
    delivery: Delivery | None = None,
    on_step: OnStep | None = None,
) -> SearchResult:
    """Run ``optimiser`` until a releasable answer is safe and usable, it stops, or the budget ends.

    Every candidate is decoded under watch: one whose beginning is flagged is aborted there. The first in the order of
    asking that is safe and usable at its commit point is chosen, the others are aborted, and its text flows from then
    on; see :class:`~tta_middleware.guard.attempt.Delivery`.
    """
    run = _Run(parts, question, optimiser, meter, delivery or Delivery(), on_step)
    with anyio.move_on_after(meter.seconds_left) as scope:
        try:
            await run.until_done()
        except ModerationError as error:
            run.reason = f"moderator: {type(error).__name__}"
    if scope.cancelled_caught:
        run.reason = "budget: seconds"
    return SearchResult(run.winner, run.best, tuple(run.steps), run.reason, run.unscored)


@dataclass(slots=True)
class _Run:
    parts: Parts
    question: Question
    optimiser: Optimiser
    meter: Meter
    delivery: Delivery
    on_step: OnStep | None
    steps: list[StepTrace] = field(default_factory=list)
    best: Candidate | None = None
    winner: Candidate | None = None
    unscored: tuple[Proposal, Completion] | None = None
    chosen: Attempt | None = None
    reason: str = ""

    async def until_done(self) -> None:
        while not self.reason:
            await self._wave()

    async def _wave(self) -> None:
        limit = self.meter.exhausted()
        rule = self.optimiser.stop()
        if rule or limit:
            self.reason = f"optimiser: {', '.join(rule)}" if rule else f"budget: {limit}"
            return
        proposals = self.optimiser.ask(self.meter.generations_left)
        if not proposals:
            self.reason = "optimiser: nothing left to try"
            return
        wave = attempts(self.parts, self.question, proposals, self.meter, self.delivery)
        try:
            await self._race(wave)
        finally:
            step = self._record(wave)  # what a wave cost stands in the trace, whatever ended it
        if self.on_step is not None:
            await self.on_step(step)
        self._conclude(wave)

    async def _race(self, wave: Sequence[Attempt]) -> None:
        """Side by side; the first in order that is safe and usable at its commit point goes on alone."""
        try:
            async with anyio.create_task_group() as group:
                for attempt in wave:
                    group.start_soon(attempt.run)
                for attempt in wave:
                    await attempt.decided.wait()
                    if await attempt.passes():
                        await self._choose(attempt, wave)
                        break
                group.cancel_scope.cancel()
        except BaseExceptionGroup as errors:
            raise sole(errors) from None
        finally:
            for attempt in wave:
                attempt.abort()

    async def _choose(self, attempt: Attempt, wave: Sequence[Attempt]) -> None:
        self.chosen = attempt
        for other in wave:
            if other is not attempt:
                other.abort()
        await attempt.follow()

    def _record(self, wave: Sequence[Attempt]) -> StepTrace:
        scores = tuple(attempt.watch.verdict.score for attempt in wave if attempt.watch.verdict is not None)
        step = StepTrace(scores, sum(len(attempt.watch.token_ids) for attempt in wave))
        self.steps.append(step)
        return step

    def _conclude(self, wave: Sequence[Attempt]) -> None:
        told = [(attempt, loss) for attempt in wave if (loss := attempt.loss) is not None]
        self.optimiser.tell([attempt.proposal for attempt, _ in told], [loss for _, loss in told])
        for attempt, _ in told:
            self._remember(attempt)
        chosen = self.chosen
        if self.winner is not None:
            self.reason = "neutralised"
        elif chosen is not None and chosen.won and chosen.watch.unchecked:
            self.unscored = (chosen.proposal, chosen.watch.completion)
            self.reason = f"moderator: {type(chosen.watch.error).__name__}"
        elif chosen is not None and chosen.released:
            self.reason = LATE_FLAG
        else:
            self._give_up_unscored(wave)

    def _give_up_unscored(self, wave: Sequence[Attempt]) -> None:
        error = next((a.watch.error for a in wave if a.watch.ending == "unscored"), None)
        if error is not None:
            raise error

    def _remember(self, attempt: Attempt) -> None:
        candidate = attempt.candidate
        if candidate is None or not attempt.proposal.releasable:
            return
        if self.best is None or self._rank(candidate) < self._rank(self.best):
            self.best = candidate
        if attempt.won and attempt is self.chosen and not attempt.watch.unchecked:
            self.best = self.winner = candidate

    def _rank(self, candidate: Candidate) -> tuple[bool, float]:
        usable = candidate.quality is not None and candidate.quality.usable
        return (not usable, self.parts.policies.repair.decide(candidate.verdict).excess)
