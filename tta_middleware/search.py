"""The search loop: ask, generate, score, tell; counts what it spends and keeps the best checked answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import anyio

from tta_middleware.config import Budget
from tta_middleware.errors import ModerationError
from tta_middleware.policy import StagePolicies
from tta_middleware.protocols import Engine, Moderator, Optimiser, Quality
from tta_middleware.types import (
    Candidate,
    Completion,
    GenerationRequest,
    PromptEmbeddings,
    Proposal,
    Sampling,
    StepTrace,
    Verdict,
)

Clock: TypeAlias = Callable[[], float]

_SEED_MASK = 2**63 - 1


@dataclass(slots=True)
class Meter:
    """What one answer has cost so far."""

    budget: Budget
    clock: Clock = time.monotonic
    generations: int = 0
    generated_tokens: int = 0
    moderation_calls: int = 0
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.clock()

    @property
    def seconds(self) -> float:
        return self.clock() - self.started

    @property
    def generations_left(self) -> int:
        return max(0, self.budget.generations - self.generations)

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the budget ends, at least 0; None without a limit."""
        limit = self.budget.seconds
        return None if limit is None else max(0.0, limit - self.seconds)

    def exhausted(self) -> str | None:
        """Name of the first limit that is reached, or None."""
        budget = self.budget
        limits = (
            ("generations", self.generations, budget.generations),
            ("generated_tokens", self.generated_tokens, budget.generated_tokens),
            ("moderation_calls", self.moderation_calls, budget.moderation_calls),
            ("seconds", self.seconds, budget.seconds),
        )
        return next((name for name, spent, limit in limits if limit is not None and spent >= limit), None)


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts that a search and a guard work with; every policy has a threshold."""

    engine: Engine
    moderator: Moderator
    quality: Quality
    policies: StagePolicies


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt as it is asked: unmoved embeddings, sampling, and the user's words for the moderator."""

    prompt: PromptEmbeddings
    sampling: Sampling
    user_text: str


@dataclass(frozen=True, slots=True, eq=False)
class SearchResult:
    """What a search found.

    Attributes:
        winner: a safe and usable answer with its verdict, or None.
        best: the best answer that may be given out: usable ones first, then safe ones, then the lowest loss.
        unscored: a usable answer that could not be scored and where it came from, if the repair policy lets such pass.
        stop_reason: ``neutralised``, ``optimiser: ...``, ``budget: ...`` or ``moderator: ...``.
    """

    winner: Candidate | None
    best: Candidate | None
    steps: tuple[StepTrace, ...]
    stop_reason: str
    unscored: tuple[Proposal, Completion] | None = None


async def generate(parts: Parts, question: Question, proposals: Sequence[Proposal], meter: Meter) -> list[Completion]:
    """Decode one wave; every generation of an answer has a seed of its own."""
    requests = []
    for i, proposal in enumerate(proposals):
        sampling = replace(question.sampling, seed=(question.sampling.seed + meter.generations + i) & _SEED_MASK)
        if proposal.temperature is not None:
            sampling = replace(sampling, temperature=proposal.temperature)
        requests.append(GenerationRequest(question.prompt.moved(proposal.matrix), sampling))
    meter.generations += len(requests)
    completions = await parts.engine.generate_batch(requests)
    meter.generated_tokens += sum(len(done.token_ids) for done in completions)
    return completions


async def score(parts: Parts, question: Question, texts: Sequence[str], meter: Meter) -> list[Verdict]:
    """One moderation request for all texts.

    Raises:
        ModerationError: a text has no verdict.
    """
    meter.moderation_calls += 1
    verdicts = await parts.moderator.moderate(texts, prompt=question.user_text)
    if len(verdicts) != len(texts):
        raise ModerationError(
            f"moderator {parts.moderator.name!r} gave {len(verdicts)} verdicts for {len(texts)} texts; "
            "an answer without a verdict is never released"
        )
    return verdicts


async def search(parts: Parts, question: Question, optimiser: Optimiser, meter: Meter) -> SearchResult:
    """Run ``optimiser`` until a releasable answer is safe and usable, it stops, or the budget ends."""
    run = _Run(parts, question, optimiser, meter)
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
    steps: list[StepTrace] = field(default_factory=list)
    best: Candidate | None = None
    winner: Candidate | None = None
    unscored: tuple[Proposal, Completion] | None = None
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
        candidates = await self._evaluate(proposals)
        self.optimiser.tell(proposals, [self._loss(candidate) for candidate in candidates])
        for candidate in candidates:
            self._remember(candidate)
        if self.winner is not None:
            self.reason = "neutralised"

    async def _evaluate(self, proposals: Sequence[Proposal]) -> list[Candidate]:
        completions = await generate(self.parts, self.question, proposals, self.meter)
        try:
            verdicts = await score(self.parts, self.question, [done.text for done in completions], self.meter)
        except ModerationError:
            if self.parts.policies.repair.on_error == "open":
                self.unscored = await self._first_usable(proposals, completions)
            raise
        self.steps.append(
            StepTrace(
                scores=tuple(verdict.score for verdict in verdicts),
                generated_tokens=sum(len(done.token_ids) for done in completions),
            )
        )
        candidates = [Candidate(*parts) for parts in zip(proposals, completions, verdicts, strict=True)]
        return await self._judge_quality(candidates)

    async def _judge_quality(self, candidates: list[Candidate]) -> list[Candidate]:
        """Only safe answers that may be given out are worth a forward pass."""
        judged = [i for i, c in enumerate(candidates) if c.proposal.releasable and self._loss(c) < 0.0]
        reports = await self.parts.quality.assess(
            self.parts.engine, self.question.prompt, [candidates[i].completion for i in judged]
        )
        for i, report in zip(judged, reports, strict=True):
            candidates[i] = replace(candidates[i], quality=report)
        return candidates

    async def _first_usable(
        self, proposals: Sequence[Proposal], completions: Sequence[Completion]
    ) -> tuple[Proposal, Completion] | None:
        mine = [pair for pair in zip(proposals, completions, strict=True) if pair[0].releasable]
        reports = await self.parts.quality.assess(self.parts.engine, self.question.prompt, [done for _, done in mine])
        return next((pair for pair, report in zip(mine, reports, strict=True) if report.usable), None)

    def _remember(self, candidate: Candidate) -> None:
        if not candidate.proposal.releasable:
            return
        if self.best is None or self._rank(candidate) < self._rank(self.best):
            self.best = candidate
        if _passes(self.best):
            self.winner = self.best

    def _rank(self, candidate: Candidate) -> tuple[bool, float]:
        return (not _passes(candidate), self._loss(candidate))

    def _loss(self, candidate: Candidate) -> float:
        return self.parts.policies.repair.decide(candidate.verdict).excess


def _passes(candidate: Candidate) -> bool:
    """Safe, since only safe answers have a report, and usable."""
    return candidate.quality is not None and candidate.quality.usable
