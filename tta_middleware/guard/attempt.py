"""One candidate of a search: decoded under watch, decided at its commit point, followed to its end if chosen."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import anyio

from tta_middleware.call_text import json_reading
from tta_middleware.config import Budget, Windows
from tta_middleware.errors import EngineError
from tta_middleware.guard.holdback import HoldBack, Reading
from tta_middleware.guard.watch import Watch, verdict_on
from tta_middleware.policy import Policy, StagePolicies
from tta_middleware.protocols import Engine, Moderator, Quality
from tta_middleware.types import (
    AbortSignal,
    Candidate,
    Completion,
    FinishReason,
    GenerationRequest,
    PromptEmbeddings,
    Proposal,
    QualityReport,
    Sampling,
    TextDelta,
    Verdict,
)

Clock: TypeAlias = Callable[[], float]
Emit: TypeAlias = Callable[[str], Awaitable[None]]

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
    """The parts that a search and a guard work with; every policy has a threshold.

    ``reading`` is what consumers make of an answer; whatever of it is scored, is scored as it was written and so.
    """

    engine: Engine
    moderator: Moderator
    quality: Quality
    policies: StagePolicies
    reading: Reading = json_reading


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt as it is asked: unmoved embeddings, sampling, and the user's words for the moderator.

    ``prefix`` is what the answer goes on from, which ``prompt`` holds at its end; ``ticket`` that of its sequences.
    """

    prompt: PromptEmbeddings
    sampling: Sampling
    user_text: str
    prefix: str = ""
    ticket: int | None = None


@dataclass(frozen=True, slots=True)
class Delivery:
    """How candidates are checked and where the chosen one goes.

    Attributes:
        windows: how candidates are cut; None checks each whole at its end, so none is aborted early.
        commit: choose a candidate as soon as its first window is safe and usable; otherwise at its end.
        emit: takes the chosen candidate's text as it is checked; None keeps it until its end.
    """

    windows: Windows | None = None
    commit: bool = False
    emit: Emit | None = None


async def score(parts: Parts, question: Question, text: str, meter: Meter, decoded: str | None = None) -> Verdict:
    """One moderation request for a text and for what it says once decoded.

    Raises:
        ModerationError: the text has no verdict.
    """
    meter.moderation_calls += 1
    return await verdict_on(parts.moderator, text, decoded, prompt=question.user_text)


def watched(
    parts: Parts,
    question: Question,
    source: AsyncGenerator[TextDelta, None],
    meter: Meter,
    policy: Policy,
    windows: Windows | None,
    release: Callable[[str], Awaitable[bool]],
    abort: AbortSignal,
    opening: str = "",
) -> Watch:
    """A watch over one decode whose tokens and checks go on the meter; ``opening`` is checked like the rest."""
    return Watch(
        source=metered(source, meter, abort, opening),
        hold=HoldBack(windows, question.prefix, parts.reading),
        policy=policy,
        check=lambda window: score(parts, question, window.text, meter, window.decoded),
        release=release,
        ahead=(windows or Windows()).ahead,
    )


async def metered(
    source: AsyncGenerator[TextDelta, None], meter: Meter, abort: AbortSignal, opening: str = ""
) -> AsyncGenerator[TextDelta, None]:
    """``opening`` and the stream; its tokens are counted when they come, so those of an aborted decode are, too.

    Raises:
        EngineError: the engine broke the answer off by itself, without an end of its own; a part of an answer must
            not pass for the whole.
    """
    reason: FinishReason | None = None
    try:
        if opening:
            yield TextDelta(opening)
        async for delta in source:
            meter.generated_tokens += len(delta.token_ids)
            reason = delta.finish_reason
            if reason != "aborted" or abort.is_set():
                yield delta
    finally:
        await source.aclose()
    if reason not in ("stop", "length") and not abort.is_set():
        raise EngineError("the engine broke the answer off before its end; ask again")


def attempts(
    parts: Parts, question: Question, proposals: Sequence[Proposal], meter: Meter, delivery: Delivery
) -> list[Attempt]:
    """One attempt per proposal; every generation of an answer has a seed of its own."""
    requests = [request(question, proposal, meter.generations + i) for i, proposal in enumerate(proposals)]
    meter.generations += len(requests)
    streams = parts.engine.stream_batch(requests)
    return [
        Attempt(parts, question, proposal, wanted, stream, meter, delivery)
        for proposal, wanted, stream in zip(proposals, requests, streams, strict=True)
    ]


def request(question: Question, proposal: Proposal, generation: int) -> GenerationRequest:
    """What the engine is asked for a proposal that is an answer's ``generation``-th."""
    sampling = replace(question.sampling, seed=(question.sampling.seed + generation) & _SEED_MASK)
    if proposal.temperature is not None:
        sampling = replace(sampling, temperature=proposal.temperature)
    prompt = (proposal.prompt or question.prompt).moved(proposal.matrix)
    return GenerationRequest(prompt, sampling, ticket=question.ticket)


class Attempt:
    """One proposal on its way to an answer.

    Attributes:
        watch: its stream.
        decided: set when the commit point is reached or the stream is over.
        released: what was emitted of it.
        won: it was chosen, and its whole text is safe and usable.
    """

    def __init__(
        self,
        parts: Parts,
        question: Question,
        proposal: Proposal,
        wanted: GenerationRequest,
        stream: AsyncGenerator[TextDelta, None],
        meter: Meter,
        delivery: Delivery,
    ) -> None:
        # Shared by two tasks on one event loop, so that only an ``await`` hands over between them: the attempt's own
        # (``run``, which calls _take) and the search's (passes, follow, abort).
        # - _checked: written by _take alone, before it sets ``decided``.
        # - _followed: set by the search, once, with nothing awaited before its first _emit. Until then only the search
        #   assesses, afterwards _take does for each window, and the search again when ``_over`` is set.
        # - _judged, _quality, _assessed: written by whichever of the two assesses; _judged only grows.
        # - released: both emit. It is moved on together with cutting the piece, before anything is awaited, so no piece
        #   goes out twice, and the receiver takes pieces in the order in which they were cut.
        # - won: written by the search; read by it after ``_over``.
        self.proposal = proposal
        self.decided = anyio.Event()
        self.released = ""
        self.won = False
        self._parts, self._question, self._delivery = parts, question, delivery
        self._abort, self._scope = wanted.abort, anyio.CancelScope()
        self._over = anyio.Event()
        self._checked = ""
        self._judged = 0
        self._quality: QualityReport | None = None
        self._assessed: Completion | None = None
        self._followed = False
        windows = None if proposal.whole else delivery.windows
        policy, opening = parts.policies.repair, proposal.opening
        self.watch = watched(parts, question, stream, meter, policy, windows, self._take, self._abort, opening)

    async def run(self) -> None:
        """Decode until the end, a flag, or :meth:`abort`."""
        try:
            with self._scope:
                await self.watch.run()
        finally:
            self.abort()
            self.decided.set()
            self._over.set()

    def abort(self) -> None:
        """Stop decoding within one step; what was emitted stays."""
        self._abort.set()
        if not self._over.is_set():
            self._scope.cancel()

    async def passes(self) -> bool:
        """Safe and usable as far as it was checked, and one that may be given out."""
        if not self.proposal.releasable or self.watch.ending not in (None, "done"):
            return False
        return (self.watch.ending == "done" or bool(self._checked)) and await self._usable()

    async def follow(self) -> None:
        """Emit what was checked and judged, and the rest as it is, until the end."""
        self._followed = True
        await self._emit()
        await self._over.wait()
        self.won = self.watch.ending == "done" and await self._usable()
        if self.won:
            await self._emit()

    @property
    def loss(self) -> float | None:
        """Excess over the threshold by the newest verdict; None without one."""
        verdict = self.watch.verdict
        return None if verdict is None else self._parts.policies.repair.decide(verdict).excess

    @property
    def candidate(self) -> Candidate | None:
        """The whole answer with its newest verdict; None without one."""
        if self.watch.verdict is None:
            return None
        done = self.watch.completion
        whole = Completion(self._question.prefix + done.text, done.token_ids, done.finish_reason)
        return Candidate(self.proposal, whole, self.watch.verdict, self._quality)

    async def _take(self, text: str) -> bool:
        """Checked text, in order. What follows a commit must be usable, too."""
        self._checked += text
        if self._followed:
            if not await self._usable():
                return False
            await self._emit()
        elif self._delivery.commit:
            self.decided.set()
        return True

    async def _emit(self) -> None:
        piece = self._checked[len(self.released) : self._judged]
        if self._delivery.emit is not None and piece:
            self.released += piece
            await self._delivery.emit(piece)

    async def _usable(self) -> bool:
        whole = self.watch.completion
        seen = whole if self.watch.finish_reason else replace(whole, text=self._checked)
        if self._quality is not None and seen == self._assessed:
            return self._quality.usable
        self._assessed = seen
        opened = self.proposal.prompt if self.proposal.opening else None
        unmoved = opened or self._question.prompt
        (self._quality,) = await self._parts.quality.assess(self._parts.engine, unmoved, [seen])
        if self._quality.usable:
            self._judged = len(seen.text)
        return self._quality.usable
