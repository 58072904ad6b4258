"""The one place where engine, moderator, policy and search meet."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import anyio
import numpy as np

from tta_middleware.config import Budget
from tta_middleware.errors import ModerationError, UnsafeAnswerError
from tta_middleware.optimise.base import Method, Start
from tta_middleware.optimise.geometry import cosine, relative_move
from tta_middleware.policy import Policy, StagePolicies
from tta_middleware.protocols import Engine, Moderator, Quality
from tta_middleware.quality import QualityGate
from tta_middleware.search import Clock, Meter, Parts, Question, generate, score, search
from tta_middleware.types import (
    AnswerScore,
    Candidate,
    Completion,
    GuardedAnswer,
    Message,
    Outcome,
    PromptEmbeddings,
    Proposal,
    Sampling,
    StepTrace,
    Trace,
)

FallbackFunction: TypeAlias = Callable[[Sequence[Message]], Awaitable[str]]
Fallback: TypeAlias = Literal["refuse", "raise"] | FallbackFunction


@dataclass(frozen=True, slots=True)
class Repair:
    """How a flagged answer is repaired.

    Attributes:
        method: a search method; None blocks and falls back at once.
        budget: what one answer may cost, the first one included.
        fallback: what follows when no safe and usable answer was found: the policy's notice, an
            :class:`~tta_middleware.errors.UnsafeAnswerError`, or an async function of the messages whose text
            is moderated like any other.
        seed: the search's random generator; equal seeds give equal searches.
    """

    method: Method | None = None
    budget: Budget = field(default_factory=Budget)
    fallback: Fallback = "refuse"
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Report:
    """An answer with everything that was found on the way, for evaluations.

    Unlike :class:`~tta_middleware.types.GuardedAnswer` it holds candidates, flagged ones among them: never show
    their text.
    """

    answer: GuardedAnswer
    baseline: Candidate | None
    final: Candidate | None


class Guard:
    """Answers conversations; nothing leaves it that the moderator has not scored below the policy's threshold.

    A guard holds no state of a request and may be used from any number of tasks and event loops.
    """

    def __init__(
        self,
        engine: Engine,
        moderator: Moderator,
        *,
        policy: Policy | StagePolicies | None = None,
        repair: Repair | None = None,
        quality: Quality | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        policies = StagePolicies.of(policy).with_default(moderator.default_threshold)
        self._parts = Parts(engine, moderator, quality or QualityGate(), policies)
        self._repair = repair or Repair()
        self._clock = clock

    async def answer(self, messages: Sequence[Message], sampling: Sampling | None = None) -> GuardedAnswer:
        """The model's answer if it is safe, else a repaired one, else the fallback.

        Raises:
            EmptyPromptError: no message holds user text.
            EngineError: the model failed.
            UnsafeAnswerError: nothing safe and usable was found and the fallback is ``raise``.
        """
        return (await self.report(messages, sampling)).answer

    async def report(
        self, messages: Sequence[Message], sampling: Sampling | None = None, *, judge_all: bool = False
    ) -> Report:
        """As :meth:`answer`, with the candidates.

        ``judge_all`` measures the usability of the first and the last answer in any case; by default it is
        measured where the decision needs it: on safe answers of a repair.
        """
        meter = Meter(self._repair.budget, self._clock)
        request = _Request(self._parts, self._repair, messages, sampling or Sampling(), meter, judge_all)
        return await request.run()


@dataclass(slots=True)
class _Request:
    """The state of one request."""

    parts: Parts
    repair: Repair
    messages: Sequence[Message]
    sampling: Sampling
    meter: Meter
    judge_all: bool
    first: Completion | None = None
    baseline: Candidate | None = None
    final: Candidate | None = None
    point: Proposal | None = None
    steps: tuple[StepTrace, ...] = ()

    async def run(self) -> Report:
        prompt = await self.parts.engine.embed(self.messages)
        question = Question(prompt, self.sampling, last_user_text(self.messages))
        stop_reason = await self._first_answer(question)
        if self.baseline is not None and self.parts.policies.output.decide(self.baseline.verdict).flagged:
            return await self._search(question, self.baseline)
        if self.baseline is not None:
            self.final = self.baseline
            return await self._deliver(question, self.baseline.completion, "clean", stop_reason)
        if self.first is not None and self.parts.policies.output.on_error == "open":
            return await self._deliver(question, self.first, "unchecked", f"{stop_reason}, passed by policy")
        return await self._fall_back(question, stop_reason)

    async def _first_answer(self, question: Question) -> str:
        """Decode and score the unmoved prompt's answer; says why where that fails."""
        proposal = Proposal(question.prompt.matrix)
        with anyio.move_on_after(self.meter.seconds_left):
            try:
                self.first = (await generate(self.parts, question, [proposal], self.meter))[0]
                verdict = (await score(self.parts, question, [self.first.text], self.meter))[0]
            except ModerationError as error:
                return f"moderator: {type(error).__name__}"
            self.baseline = Candidate(proposal, self.first, verdict)
            return "clean"
        return "budget: seconds"

    async def _search(self, question: Question, baseline: Candidate) -> Report:
        if self.repair.method is None:
            return await self._fall_back(question, "no repair method")
        rng = np.random.default_rng([self.repair.seed & 2**63 - 1, *question.prompt.token_ids.tolist()])
        loss = self.parts.policies.repair.decide(baseline.verdict).excess
        found = await search(self.parts, question, self.repair.method.build(Start(question.prompt, loss, rng)), self.meter)
        self.steps, self.final = found.steps, found.best
        if found.winner is None and found.unscored is not None:
            self.final, (self.point, completion) = None, found.unscored
            return await self._deliver(question, completion, "unchecked", f"{found.stop_reason}, passed by policy")
        if found.winner is None:
            return await self._fall_back(question, found.stop_reason)
        self.final = found.winner
        return await self._deliver(question, found.winner.completion, "neutralised", found.stop_reason)

    async def _fall_back(self, question: Question, stop_reason: str) -> Report:
        fallback = self.repair.fallback
        trace = await self._trace(question, "blocked", stop_reason)
        if fallback == "raise":
            raise UnsafeAnswerError(
                f"no safe and usable answer within the budget ({stop_reason}); "
                "raise the budget, choose another method, or set fallback='refuse'",
                trace,
            )
        text = self.parts.policies.output.notice
        if callable(fallback):
            text = await self._checked_fallback(question, fallback)
            trace = replace(trace, moderation_calls=self.meter.moderation_calls, seconds=self.meter.seconds)
        answer = GuardedAnswer(text, "content_filter", trace, len(question.prompt.token_ids))
        return Report(answer, self.baseline, self.final)

    async def _checked_fallback(self, question: Question, fallback: FallbackFunction) -> str:
        """The fallback's own text is moderated; where that fails, the notice stands in."""
        text = await fallback(self.messages)
        try:
            verdict = (await score(self.parts, question, [text], self.meter))[0]
        except ModerationError:
            return self.parts.policies.output.notice
        return self.parts.policies.output.notice if self.parts.policies.output.decide(verdict).flagged else text

    async def _deliver(self, question: Question, completion: Completion, outcome: Outcome, stop_reason: str) -> Report:
        trace = await self._trace(question, outcome, stop_reason)
        finish: Literal["stop", "length"] = "length" if completion.finish_reason == "length" else "stop"
        answer = GuardedAnswer(completion.text, finish, trace, len(question.prompt.token_ids))
        return Report(answer, self.baseline, self.final)

    async def _trace(self, question: Question, outcome: Outcome, stop_reason: str) -> Trace:
        policies = self.parts.policies
        unmoved = self.final is self.baseline
        if self.judge_all:
            self.baseline = await self._with_quality(question, self.baseline)
            self.final = self.baseline if unmoved else await self._with_quality(question, self.final)
        cosine_, relative, decodes = await self._move(question.prompt)
        return Trace(
            method=self.repair.method.name if self.repair.method else "none",
            outcome=outcome,
            stop_reason=stop_reason,
            baseline=_answer_score(self.baseline, policies.output),
            final=_answer_score(self.final, policies.output if unmoved else policies.repair),
            generations=self.meter.generations,
            generated_tokens=self.meter.generated_tokens,
            moderation_calls=self.meter.moderation_calls,
            seconds=self.meter.seconds,
            steps=self.steps,
            cosine=cosine_,
            relative_move=relative,
            decodes_to_original=decodes,
            seed=self.repair.seed,
            moderator=self.parts.moderator.name,
            model=self.parts.engine.model_id,
        )

    async def _with_quality(self, question: Question, candidate: Candidate | None) -> Candidate | None:
        if candidate is None or candidate.quality is not None:
            return candidate
        reports = await self.parts.quality.assess(self.parts.engine, question.prompt, [candidate.completion])
        return replace(candidate, quality=reports[0])

    async def _move(self, prompt: PromptEmbeddings) -> tuple[float, float, bool]:
        """Cosine and relative norm of the answer's move, and whether its rows still decode to their tokens."""
        point = self.point or (self.final.proposal if self.final else None)
        matrix = point.matrix if point else prompt.matrix
        changed = (matrix != prompt.matrix).any(axis=1)
        if not changed.any():
            return 1.0, 0.0, True
        rows = changed | prompt.user_mask
        moved, origin = matrix[rows], prompt.matrix[rows]
        nearest = await self.parts.engine.nearest_tokens(moved)
        decodes = bool((nearest == prompt.token_ids[rows]).all())
        return cosine(moved, origin), relative_move(moved, origin), decodes


def _answer_score(candidate: Candidate | None, policy: Policy) -> AnswerScore | None:
    if candidate is None:
        return None
    decision = policy.decide(candidate.verdict)
    quality = candidate.quality
    return AnswerScore(
        score=candidate.verdict.score,
        flagged=decision.flagged,
        category=decision.category,
        usable=quality.usable if quality else None,
        problems=quality.problems if quality else (),
        shadowed=decision.shadowed,
    )


def last_user_text(messages: Sequence[Message]) -> str:
    """The last user turn's words; empty if there is none."""
    return next((message.content for message in reversed(messages) if message.role == "user"), "")
