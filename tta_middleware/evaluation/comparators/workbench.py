"""Decodes, scores and counts for comparators that are no search over one prompt's embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from tta_middleware.call_text import json_reading
from tta_middleware.evaluation.comparators.comparator import Bench
from tta_middleware.guard.context import (
    Conversation,
    Meter,
    Question,
    RequestContext,
    check_ended,
    generation_request,
)
from tta_middleware.guard.search import answer_score, move_of
from tta_middleware.guard.settings import Report
from tta_middleware.moderation.concurrency import gather
from tta_middleware.policy import Policy, StagePolicies
from tta_middleware.policy.verdicts import verdict_on
from tta_middleware.types import (
    Candidate,
    Completion,
    GuardedAnswer,
    Message,
    PromptEmbeddings,
    Proposal,
    Sampling,
    StepTrace,
    Trace,
    Verdict,
)


@dataclass(slots=True)
class Workbench:
    """The work on one flagged answer, which asks engine, moderator and quality gate as a guard's request does.

    Its meter counts as the guard's, on top of what the undefended answer took. The budget's limit on generations
    shortens what :meth:`answers` is asked for.
    """

    name: str
    start: Report
    context: RequestContext
    question: Question
    seed: int
    steps: list[StepTrace] = field(default_factory=list)

    @classmethod
    async def open(cls, name: str, bench: Bench, messages: Sequence[Message], sampling: Sampling) -> Workbench:
        """Take the undefended answer; see :attr:`flagged` for whether there is anything to do."""
        meter = Meter(bench.budget)
        start = await bench.guard(None).report(messages, sampling, judge_all=True)
        spent = start.answer.trace
        meter.generations, meter.generated_tokens = spent.generations, spent.generated_tokens
        meter.moderation_calls = spent.moderation_calls
        context = RequestContext(
            engine=bench.engine,
            moderator=bench.moderator,
            quality=bench.quality,
            policies=StagePolicies.of(bench.policy).with_default(bench.moderator.default_threshold),
            reading=json_reading,
            conversation=Conversation(messages),
            sampling=sampling,
            meter=meter,
        )
        return cls(name, start, context, Question(await context.embed(), sampling), bench.seed)

    @property
    def messages(self) -> Sequence[Message]:
        return self.context.conversation.messages

    @property
    def prompt(self) -> PromptEmbeddings:
        """The conversation, unmoved."""
        return self.question.prompt

    @property
    def policy(self) -> Policy:
        """The policy for candidates of a repair."""
        return self.context.policies.repair

    @property
    def flagged(self) -> bool:
        """Whether the undefended answer was scored and flagged."""
        score = self.start.answer.trace.baseline
        return score is not None and score.flagged

    async def answers(self, proposals: Sequence[Proposal]) -> list[Candidate]:
        """Decode whole answers side by side, each with a seed of its own, and score each.

        Raises:
            EngineError: the model failed, or broke an answer off.
            ModerationError: an answer could not be scored.
        """
        context, meter = self.context, self.context.meter
        proposals = proposals[: meter.generations_left]
        if not proposals:
            return []
        begun = enumerate(proposals, meter.generations)
        requests = [generation_request(self.question, proposal, at, context.ticket) for at, proposal in begun]
        meter.generations += len(requests)
        done = await context.engine.generate_batch(requests)
        tokens = sum(len(completion.token_ids) for completion in done)
        meter.generated_tokens += tokens
        check_ended(*(completion.finish_reason for completion in done))
        verdicts = await gather([partial(self._verdict, completion.text) for completion in done])
        self.steps.append(StepTrace(tuple(verdict.score for verdict in verdicts), tokens))
        return [Candidate(*parts) for parts in zip(proposals, done, verdicts, strict=True)]

    async def go_on(self, messages: Sequence[Message], begun: Completion, tokens: int) -> Candidate | None:
        """The answer that has begun and its next ``tokens`` tokens, decoded from ``messages`` and scored as one text.

        None if the budget leaves no generation.

        Raises:
            EngineError: the model failed, or broke the answer off.
            ModerationError: the text could not be scored.
        """
        meter = self.context.meter
        if not meter.generations_left:
            return None
        prompt = await self.context.embed(begun.text, messages)
        more = await self._decode(prompt, tokens, meter.generations)
        meter.generations += 1
        whole = replace(more, text=begun.text + more.text, token_ids=(*begun.token_ids, *more.token_ids))
        found = Candidate(Proposal(prompt.matrix, prompt=prompt, whole=True), whole, await self._verdict(whole.text))
        self.steps.append(StepTrace((found.verdict.score,), len(more.token_ids)))
        return found

    async def write(self, messages: Sequence[Message], tokens: int) -> str:
        """A text that is no answer and is shown to nobody; only its tokens count.

        Raises:
            EngineError: the model failed, or broke the text off.
        """
        return (await self._decode(await self.context.embed(messages=messages), tokens, 0)).text

    async def _decode(self, prompt: PromptEmbeddings, tokens: int, generation: int) -> Completion:
        sampling = replace(self.question.sampling, max_new_tokens=tokens)
        request = generation_request(
            Question(prompt, sampling), Proposal(prompt.matrix), generation, self.context.ticket
        )
        (done,) = await self.context.engine.generate_batch([request])
        self.context.meter.generated_tokens += len(done.token_ids)
        check_ended(done.finish_reason)
        return done

    async def score_part(self, begun: Completion) -> Candidate:
        """The beginning of an answer that was decoded already, scored by one more moderation call."""
        return Candidate(Proposal(self.prompt.matrix), begun, await self._verdict(begun.text))

    async def score(self, text: str, token_ids: Sequence[int]) -> Candidate:
        """A text that needs no decoding, scored without being counted."""
        verdict = await verdict_on(self.context.moderator, text, prompt=self.context.conversation.user_text)
        return Candidate(Proposal(self.prompt.matrix), Completion(text, tuple(token_ids), "stop"), verdict)

    def safe(self, candidate: Candidate) -> bool:
        """Whether the policy lets the candidate's text pass."""
        return not self.policy.decide(candidate.verdict).reached

    async def report(self, final: Candidate | None, *, moves_words: bool = False) -> Report:
        """The result with ``final`` as the answer; None if nothing was decoded. ``moves_words``: the tokens changed."""
        if final is None:
            return self.start
        quality = await self.context.assess(self.prompt, final.completion)
        final = replace(final, quality=quality)
        passed = self.safe(final) and quality.usable
        trace = await self._trace(final, passed=passed, moves_words=moves_words)
        text = final.completion.text if passed else self.policy.notice
        answer = GuardedAnswer(text, "stop" if passed else "content_filter", trace, len(self.prompt.token_ids))
        return Report(answer, self.start.baseline, final)

    async def _verdict(self, text: str) -> Verdict:
        return await self.context.score(text, self.context.reading(text, 0))

    async def _trace(self, final: Candidate, *, passed: bool, moves_words: bool) -> Trace:
        meter, move = self.context.meter, (math.nan, math.nan, False)
        if not moves_words:
            move = await move_of(self.context.engine, self.prompt, final.proposal)
        cosine, relative, decodes = move
        return replace(
            self.start.answer.trace,
            method=self.name,
            outcome="neutralised" if passed else "blocked",
            stop_reason="neutralised" if passed else f"{self.name}: no safe and usable answer",
            final=answer_score(final, self.policy),
            generations=meter.generations,
            generated_tokens=meter.generated_tokens,
            moderation_calls=meter.moderation_calls,
            seconds=meter.seconds,
            steps=tuple(self.steps),
            cosine=cosine,
            relative_move=relative,
            decodes_to_original=decodes,
        )
