"""One request from its prompt to its last character."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import anyio
import numpy as np

from tta_middleware.aio.streams import sole
from tta_middleware.config import Windows
from tta_middleware.errors import ConfigurationError, ModerationError, UnsafeAnswerError
from tta_middleware.guard.attempt import Delivery, Meter, Parts, Question, request, score, watched
from tta_middleware.guard.events import Finished, Released, RepairFinished, RepairStarted, RepairStep, StreamEvent
from tta_middleware.guard.search import LATE_FLAG, SearchResult, search
from tta_middleware.guard.settings import Conversation, FallbackFunction, PromptCheck, Repair, Report
from tta_middleware.guard.start import prepare
from tta_middleware.guard.trace import answer_score, move_of
from tta_middleware.guard.watch import Watch, verdicts_on
from tta_middleware.methods.base import Method
from tta_middleware.methods.bridged import Bridged
from tta_middleware.types import (
    Candidate,
    Completion,
    GuardedAnswer,
    Outcome,
    Proposal,
    Sampling,
    StepTrace,
    Trace,
    next_ticket,
)

LEAST_CONTINUATION = 32
"""Tokens that a repair gets after a late flag, however many have left; fewer make no usable end."""

Send: TypeAlias = Callable[[StreamEvent], Awaitable[None]]
"""As in ``_streams``: takes an event before it waits for anything."""


@dataclass(slots=True)
class Answering:
    """The state of one request.

    ``windows`` is how the first answer is released; None holds it to its end. ``checks`` is how candidates are cut.
    Released text and events go to ``send``.
    """

    parts: Parts
    repair: Repair
    conversation: Conversation
    sampling: Sampling
    meter: Meter
    windows: Windows | None
    checks: Windows
    prompt_check: PromptCheck
    judge_all: bool
    send: Send | None
    load_seconds: float = 0.0
    question: Question = field(init=False)
    prompt_tokens: int = 0
    released: str = ""
    repairs: int = 0
    seam: int = 0
    baseline: Candidate | None = None
    final: Candidate | None = None
    point: Proposal | None = None
    ticket: int = field(default_factory=next_ticket)
    steps: tuple[StepTrace, ...] = ()
    _prompt_passed: anyio.Event = field(default_factory=anyio.Event)

    async def run(self) -> Report:
        self.question = await self._ask("")
        self.prompt_tokens = len(self.question.prompt.token_ids)
        refused = ""
        try:
            async with anyio.create_task_group() as group:
                with anyio.CancelScope() as work:

                    async def check() -> None:
                        nonlocal refused
                        refused = await self._refuse_prompt()
                        if refused:
                            work.cancel()  # the gate stays shut, so that what waits there is never said
                        else:
                            self._prompt_passed.set()

                    group.start_soon(check)
                    report = await self._answer()
        except BaseExceptionGroup as errors:
            raise sole(errors) from None
        if refused:
            self.final = None
            self._prompt_passed.set()  # the work has ended; only this is left to say
            report = await self._fall_back(refused)
        await self._tell(Finished(report.answer))
        return report

    async def _ask(self, prefix: str) -> Question:
        """The conversation as a question; with a prefix, the tokens that it takes count as answered."""
        talk = self.conversation
        tools = {"tools": talk.tools} if talk.tools else {}
        prompt = await self.parts.engine.embed(talk.messages, assistant_prefix=prefix, **tools)
        used = max(0, len(prompt.token_ids) - self.prompt_tokens) if prefix else 0
        limit = self.sampling.max_new_tokens
        left = replace(self.sampling, max_new_tokens=max(min(limit, LEAST_CONTINUATION), limit - used))
        return Question(prompt, left, talk.user_text, prefix, self.ticket)

    async def _refuse_prompt(self) -> str:
        """Why the prompt is refused, empty if it is not; runs beside the first decode steps."""
        if self.prompt_check == "off":
            return ""
        policy = self.parts.policies.prompt
        texts = [m.content for m in self.conversation.messages if m.content]
        if self.prompt_check == "user":
            texts = [self.question.user_text]
        self.meter.moderation_calls += 1
        verdicts = None
        try:
            with anyio.move_on_after(self.meter.seconds_left):
                verdicts = await verdicts_on(self.parts.moderator, texts)
        except ModerationError as error:
            return "" if policy.lets_pass(error) else f"moderator: {type(error).__name__}"
        if verdicts is None:
            return "budget: seconds"
        decisions = [policy.decide(verdict) for verdict in verdicts]
        return next((f"prompt: {decision.category}" for decision in decisions if decision.flagged), "")

    async def _answer(self) -> Report:
        if limit := self.meter.exhausted():
            return await self._fall_back(f"budget: {limit}")
        watch = await self._first_answer()
        if watch.ending == "done" and not watch.unchecked:
            self.final = self.baseline
            return await self._deliver(watch.completion, "clean", "clean")
        reason = f"moderator: {type(watch.error).__name__}" if watch.error else "budget: seconds"
        if watch.ending == "done":
            return await self._deliver(watch.completion, "unchecked", f"{reason}, passed by policy")
        if watch.ending == "flagged" and self.baseline is not None:
            return await self._repaired(self.baseline)
        return await self._fall_back(reason)

    async def _first_answer(self) -> Watch:
        """The unmoved prompt's answer, released as it is checked."""
        proposal = Proposal(self.question.prompt.matrix)
        wanted = request(self.question, proposal, self.meter.generations)
        self.meter.generations += 1
        source = self.parts.engine.stream(wanted)
        policy = self.parts.policies.output
        watch = watched(self.parts, self.question, source, self.meter, policy, self.windows, self._take, wanted.abort)
        with anyio.move_on_after(self.meter.seconds_left):
            await watch.run()
        if watch.verdict is not None:
            self.baseline = Candidate(proposal, watch.completion, watch.verdict)
        return watch

    async def _repaired(self, baseline: Candidate) -> Report:
        if self.repair.method is None:
            return await self._fall_back("no repair method")
        while True:
            if limit := self.meter.exhausted():
                return await self._give_up(f"budget: {limit}")
            found = await self._search(self.repair.method, baseline)
            if found.winner is not None:
                self.final = found.winner
                return await self._finish_repair(found.winner.completion, "neutralised", found.stop_reason)
            if found.unscored is not None:
                self.final, (self.point, completion) = None, found.unscored
                reason = f"{found.stop_reason}, passed by policy"
                return await self._finish_repair(completion, "unchecked", reason)
            if found.stop_reason != LATE_FLAG:
                return await self._give_up(found.stop_reason)

    async def _search(self, method: Method, baseline: Candidate) -> SearchResult:
        """One search for what follows the text that has left so far."""
        self.repairs, self.seam = self.repairs + 1, len(self.released)
        optimiser, reason = None, "budget: seconds"
        with anyio.move_on_after(self.meter.seconds_left):
            try:
                optimiser = await self._prepare(method, baseline)
            except ConfigurationError as error:
                # No room behind what has left, say. The fallback stands then; the user did nothing wrong.
                reason = f"unprepared: {type(error).__name__}"
        if optimiser is None:
            return SearchResult(None, None, (), reason)
        found = await search(self.parts, self.question, optimiser, self.meter, self._delivery(), self._on_step)
        self.steps += found.steps
        self.final = found.best
        return found

    async def _prepare(self, method: Method, baseline: Candidate) -> Bridged:
        """What the search of a repair asks for its proposals."""
        decision = self.parts.policies.repair.decide(baseline.verdict)
        await self._tell(RepairStarted(baseline.verdict.score, decision.category, self.seam))
        if self.released:
            self.question = await self._ask(self.released)
        rng = np.random.default_rng([self.repair.seed & 2**63 - 1, *self.question.prompt.token_ids.tolist()])
        start = await prepare(
            self.parts.engine,
            method,
            self.conversation.messages,
            self.question.prompt,
            self.question.prefix,
            decision.excess,
            rng,
            self.conversation.tools,
        )
        # With windows the first answer was dropped where it was flagged, and its score is that of a window.
        start = replace(start, whole=self.windows is None)
        return Bridged(method.build(start), await self._bridges())

    async def _bridges(self) -> list[Proposal]:
        """Ways out of what has left already; none while nothing has, nor where the context has no room for one."""
        bridges = []
        for text in self.repair.bridges if self.released else ():
            with suppress(ConfigurationError):
                prompt = (await self._ask(self.released + text)).prompt
                bridges.append(Proposal(prompt.matrix, prompt=prompt, opening=text, label="bridge"))
        return bridges

    def _delivery(self) -> Delivery:
        """Candidates flow if the first answer did; their first window is what a choice is made on."""
        commit = self.repair.commit
        emit = self._emit if self.windows is not None else None
        if commit is None:
            return Delivery(self.checks, emit=emit)
        first = self.checks.model_copy(update={"first": commit, "largest": max(commit, self.checks.largest)})
        return Delivery(first, commit=True, emit=emit)

    async def _on_step(self, step: StepTrace) -> None:
        await self._tell(RepairStep(step))

    async def _finish_repair(self, completion: Completion, outcome: Outcome, stop_reason: str) -> Report:
        await self._tell(RepairFinished(outcome, stop_reason))
        return await self._deliver(completion, outcome, stop_reason)

    async def _give_up(self, stop_reason: str) -> Report:
        """Nothing safe and usable was found, or nothing was tried."""
        if self.repairs:
            await self._tell(RepairFinished("blocked", stop_reason))
        return await self._fall_back(stop_reason)

    async def _fall_back(self, stop_reason: str) -> Report:
        """What has left stays; after it comes the notice, or what the fallback says."""
        # An exception leaves as well as a text does, and a fallback of the user's is not called twice.
        await self._prompt_passed.wait()
        fallback = self.repair.fallback
        trace = await self._trace("blocked", stop_reason)
        if fallback == "raise":
            raise UnsafeAnswerError(
                f"no safe and usable answer within the budget ({stop_reason}); "
                "raise the budget, choose another method, or set fallback='refuse'",
                trace,
            )
        text = self._after_what_left(self.parts.policies.output.notice)
        if callable(fallback):
            text = await self._checked_fallback(fallback) or text
            trace = replace(trace, moderation_calls=self.meter.moderation_calls, seconds=self.meter.seconds)
        await self._tell(Released(text))
        answer = GuardedAnswer(self.released, "content_filter", trace, self.prompt_tokens)
        return Report(answer, self.baseline, self.final)

    async def _checked_fallback(self, fallback: FallbackFunction) -> str:
        """What the fallback adds, moderated by itself and as the end of the answer; empty where that fails."""
        text = await fallback(self.conversation.messages)
        added = self._after_what_left(text)
        try:
            for said in dict.fromkeys((text, self.released + added)):
                decoded = self.parts.reading(said, 0)
                verdict = await score(self.parts, self.question, said, self.meter, decoded)
                if self.parts.policies.output.decide(verdict).flagged:
                    return ""
        except ModerationError:
            return ""
        return added

    def _after_what_left(self, text: str) -> str:
        return f"\n\n{text}" if self.released else text

    async def _deliver(self, completion: Completion, outcome: Outcome, stop_reason: str) -> Report:
        await self._prompt_passed.wait()
        if rest := completion.text[len(self.released) :]:
            await self._tell(Released(rest))
        trace = await self._trace(outcome, stop_reason)
        # An answer that its engine broke off does not come here; see attempt.metered.
        finish: Literal["stop", "length"] = "length" if completion.finish_reason == "length" else "stop"
        return Report(GuardedAnswer(self.released, finish, trace, self.prompt_tokens), self.baseline, self.final)

    async def _take(self, text: str) -> bool:
        await self._tell(Released(text))
        return True

    async def _emit(self, text: str) -> None:
        await self._tell(Released(text))

    async def _tell(self, event: StreamEvent) -> None:
        """The one way out: nothing is said before the prompt has passed its check, whoever says it.

        The first answer's watch and a search never speak at the same time; a search ends before its repair goes on.
        Between the gate and ``send``, which takes the event before it waits, nothing is awaited: so ``released`` is
        what has left, even if the deadline cuts whoever waits there for a slow consumer.
        """
        if not self._prompt_passed.is_set():
            await self._prompt_passed.wait()
        if isinstance(event, Released):
            self.released += event.text
        if self.send is not None:
            await self.send(event)

    async def _trace(self, outcome: Outcome, stop_reason: str) -> Trace:
        policies = self.parts.policies
        unmoved = self.final is self.baseline
        if self.judge_all:
            self.baseline = await self._with_quality(self.baseline)
            self.final = self.baseline if unmoved else await self._with_quality(self.final)
        point = self.point or (self.final.proposal if self.final else None)
        cosine, relative, decodes = 1.0, 0.0, True
        if outcome != "blocked" or self.meter.seconds_left != 0.0:  # what is blocked for want of time ends at once
            cosine, relative, decodes = await move_of(self.parts.engine, self.question.prompt, point)
        return Trace(
            method=self.repair.method.name if self.repair.method else "none",
            outcome=outcome,
            stop_reason=stop_reason,
            baseline=answer_score(self.baseline, policies.output),
            final=answer_score(self.final, policies.output if unmoved else policies.repair),
            generations=self.meter.generations,
            generated_tokens=self.meter.generated_tokens,
            moderation_calls=self.meter.moderation_calls,
            seconds=self.meter.seconds,
            steps=self.steps,
            cosine=cosine,
            relative_move=relative,
            decodes_to_original=decodes,
            seed=self.repair.seed,
            moderator=self.parts.moderator.name,
            model=self.parts.engine.model_id,
            repairs=self.repairs,
            seam=self.seam,
            move=point.label if point else "",
            load_seconds=self.load_seconds,
        )

    async def _with_quality(self, candidate: Candidate | None) -> Candidate | None:
        if candidate is None or candidate.quality is not None:
            return candidate
        reports = await self.parts.quality.assess(self.parts.engine, self.question.prompt, [candidate.completion])
        return replace(candidate, quality=reports[0])
