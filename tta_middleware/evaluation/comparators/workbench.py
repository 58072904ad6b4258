"""Decodes, scores and counts for comparators that are no search over one prompt's embeddings."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tta_middleware.evaluation.comparators.base import Bench
from tta_middleware.guard.guard import Report, last_user_text
from tta_middleware.methods.geometry import cosine, relative_move
from tta_middleware.policy import Policy, StagePolicies
from tta_middleware.policy.verdicts import verdicts_on
from tta_middleware.types import (
    AnswerScore,
    Candidate,
    Completion,
    GenerationRequest,
    GuardedAnswer,
    Message,
    PromptEmbeddings,
    Proposal,
    Sampling,
    StepTrace,
    Trace,
)

_SEED_MASK = 2**63 - 1


@dataclass(slots=True)
class Workbench:
    """The work on one flagged answer.

    It counts every generated token, every answer that was begun and every text that the moderator scored, as the guard
    does, on top of what the undefended answer took. The budget's limit on generations shortens what :meth:`answers` is
    asked for.
    """

    name: str
    bench: Bench
    messages: Sequence[Message]
    sampling: Sampling
    prompt: PromptEmbeddings
    start: Report
    started: float
    generations: int = 1
    tokens: int = 0
    calls: int = 1
    steps: list[StepTrace] = field(default_factory=list)

    @classmethod
    async def open(cls, name: str, bench: Bench, messages: Sequence[Message], sampling: Sampling) -> Workbench:
        """Take the undefended answer; see :attr:`flagged` for whether there is anything to do."""
        started = time.monotonic()
        start = await bench.guard(None).report(messages, sampling, judge_all=True)
        prompt = await bench.engine.embed(messages)
        trace = start.answer.trace
        counted = trace.generations, trace.generated_tokens, trace.moderation_calls
        return cls(name, bench, messages, sampling, prompt, start, started, *counted)

    @property
    def flagged(self) -> bool:
        """Whether the undefended answer was scored and flagged."""
        score = self.start.answer.trace.baseline
        return score is not None and score.flagged

    @property
    def policy(self) -> Policy:
        """The policy for candidates of a repair."""
        return StagePolicies.of(self.bench.policy).with_default(self.bench.moderator.default_threshold).repair

    async def answers(self, proposals: Sequence[Proposal]) -> list[Candidate]:
        """Decode whole answers side by side, each with a seed of its own, and score each.

        Raises:
            EngineError: the model failed.
            ModerationError: an answer could not be scored.
        """
        proposals = proposals[: max(0, self.bench.budget.generations - self.generations)]
        if not proposals:
            return []
        requests = [self._request(proposal, i) for i, proposal in enumerate(proposals)]
        self.generations += len(requests)
        done = await self.bench.engine.generate_batch(requests)
        tokens = sum(len(completion.token_ids) for completion in done)
        self.tokens += tokens
        candidates = await self._scored(proposals, done)
        self.steps.append(StepTrace(tuple(candidate.verdict.score for candidate in candidates), tokens))
        return candidates

    async def score(self, text: str, token_ids: Sequence[int]) -> Candidate:
        """A text that needs no decoding, scored without being counted."""
        proposal = Proposal(self.prompt.matrix)
        verdicts = await verdicts_on(self.bench.moderator, [text], prompt=last_user_text(self.messages))
        return Candidate(proposal, Completion(text, tuple(token_ids), "stop"), verdicts[0])

    def safe(self, candidate: Candidate) -> bool:
        """Whether the policy lets the candidate's text pass."""
        return not self.policy.decide(candidate.verdict).flagged

    async def report(self, final: Candidate | None, *, moves_words: bool = False) -> Report:
        """The result with ``final`` as the answer; None if nothing was decoded. ``moves_words``: the tokens changed."""
        if final is None:
            return self.start
        quality = (await self.bench.quality.assess(self.bench.engine, self.prompt, [final.completion]))[0]
        final = replace(final, quality=quality)
        passed = self.safe(final) and quality.usable
        trace = await self._trace(final, passed=passed, moves_words=moves_words)
        text = final.completion.text if passed else self.policy.notice
        answer = GuardedAnswer(text, "stop" if passed else "content_filter", trace, len(self.prompt.token_ids))
        return Report(answer, self.start.baseline, final)

    def _request(self, proposal: Proposal, index: int) -> GenerationRequest:
        seed = (self.sampling.seed + self.generations + index) & _SEED_MASK
        sampling = replace(self.sampling, seed=seed)
        if proposal.temperature is not None:
            sampling = replace(sampling, temperature=proposal.temperature)
        return GenerationRequest((proposal.prompt or self.prompt).moved(proposal.matrix), sampling)

    async def _scored(self, proposals: Sequence[Proposal], done: Sequence[Completion]) -> list[Candidate]:
        texts = [completion.text for completion in done]
        self.calls += len(texts)
        verdicts = await verdicts_on(self.bench.moderator, texts, prompt=last_user_text(self.messages))
        return [Candidate(*parts) for parts in zip(proposals, done, verdicts, strict=True)]

    async def _trace(self, final: Candidate, *, passed: bool, moves_words: bool) -> Trace:
        decision = self.policy.decide(final.verdict)
        quality = final.quality
        cosine_, move, decodes = (math.nan, math.nan, False) if moves_words else await self._move(final.proposal)
        return replace(
            self.start.answer.trace,
            method=self.name,
            outcome="neutralised" if passed else "blocked",
            stop_reason="neutralised" if passed else f"{self.name}: no safe and usable answer",
            final=AnswerScore(
                score=final.verdict.score,
                flagged=decision.flagged,
                category=decision.category,
                usable=quality.usable if quality else None,
                problems=quality.problems if quality else (),
            ),
            generations=self.generations,
            generated_tokens=self.tokens,
            moderation_calls=self.calls,
            seconds=time.monotonic() - self.started,
            steps=tuple(self.steps),
            cosine=cosine_,
            relative_move=move,
            decodes_to_original=decodes,
        )

    async def _move(self, proposal: Proposal) -> tuple[float, float, bool]:
        """Cosine and relative norm of the move of the prompt that was asked, and whether its tokens stay the same."""
        origin = proposal.prompt or self.prompt
        user = origin.user_mask
        if (proposal.matrix == origin.matrix).all():
            return 1.0, 0.0, True
        moved, still = proposal.matrix[user], origin.matrix[user]
        nearest = await self.bench.engine.nearest_tokens(moved)
        return cosine(moved, still), relative_move(moved, still), bool((nearest == origin.token_ids[user]).all())
