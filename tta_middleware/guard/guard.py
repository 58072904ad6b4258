"""A guard, and one answer of it from the prompt to the last character: the place to start reading.

:class:`Guard` holds the parts and no state of a request. For each request it makes a
:class:`~tta_middleware.guard.context.RequestContext` and an :class:`Answering`, which streams the first answer under
watch, has a flagged one repaired by a :class:`~tta_middleware.guard.search.Search`, and falls back where that fails.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import anyio
import numpy as np

from tta_middleware.aio.beside_check import unless_refused
from tta_middleware.aio.streams import owned, refuse_other_libraries
from tta_middleware.call_text import error_texts, json_reading
from tta_middleware.config import Reasoning, Windows
from tta_middleware.errors import ConfigurationError, ModerationError, TTAError, UnsafeAnswerError, unquoted
from tta_middleware.guard.context import (
    NO_METHOD,
    Clock,
    Conversation,
    Meter,
    Question,
    RequestContext,
    as_sampling,
    check_parts,
    refusal_of,
)
from tta_middleware.guard.events import Finished, Released, RepairFinished, RepairStarted, RepairStep, StreamEvent
from tta_middleware.guard.holdback import Reading
from tta_middleware.guard.quality import QualityGate
from tta_middleware.guard.search import (
    LATE_FLAG,
    Delivery,
    Reach,
    Search,
    SearchResult,
    answer_score,
    bridge_proposals,
    move_of,
    prepare,
)
from tta_middleware.guard.settings import FallbackFunction, PromptCheck, Repair, Report, check_settings, said_by
from tta_middleware.guard.watch import Watch, kept, of_part
from tta_middleware.methods.base import Method
from tta_middleware.methods.bridged import Bridged, Led
from tta_middleware.observing import Asked, observer
from tta_middleware.policy import Policy, StagePolicies
from tta_middleware.policy.coverage import covering
from tta_middleware.protocols import Engine, Moderator, Optimiser, Quality, ReasoningEngine
from tta_middleware.trace import no_verdict
from tta_middleware.types import (
    SEAM,
    AnswerScore,
    Candidate,
    Channel,
    Completion,
    GuardedAnswer,
    Message,
    Outcome,
    Proposal,
    Sampling,
    StepTrace,
    Thought,
    Trace,
    WindowScore,
)

Release: TypeAlias = Literal["window", "end"]

LEAST_CONTINUATION = 32
"""Tokens that a repair gets after a late flag, however many have left; fewer make no usable end."""

Send: TypeAlias = Callable[[StreamEvent], Awaitable[None]]
"""As in ``aio.streams``: takes an event before it waits for anything."""


class Guard:
    """Answers conversations; nothing leaves it that the moderator has not scored below the policy's threshold.

    A guard holds no state of a request and may be used from any number of tasks and event loops.

    Args:
        windows: how streaming answers, and the candidates of a repair, are cut for their checks.
        prompt_check: whether the prompt is held against the policy's prompt stage: ``user`` the last user turn,
            ``all`` every message. It runs beside the first decode steps; a flagged prompt gets the fallback.
        reading: what consumers make of an answer, which is scored beside the answer as it was written; by default
            what a parser of JSON does.
        reasoning: how a model that thinks is let think, and what becomes of its thoughts (docs/reasoning.md).

    Raises:
        ConfigurationError: the policy has a threshold for a category that the moderator does not score, or a part is
            none.
    """

    def __init__(
        self,
        engine: Engine,
        moderator: Moderator,
        *,
        policy: Policy | StagePolicies | None = None,
        repair: Repair | None = None,
        quality: Quality | None = None,
        windows: Windows | None = None,
        prompt_check: PromptCheck = "off",
        clock: Clock = time.monotonic,
        reading: Reading = json_reading,
        reasoning: Reasoning | None = None,
    ) -> None:
        check_parts(engine, moderator)
        check_settings(repair, windows, reasoning, prompt_check)
        policies = StagePolicies.of(policy).with_default(moderator.default_threshold)
        self._repair = repair or Repair()
        if self._repair.method is not None and not self._repair.method.needs.margin:
            policies = policies.without_default_margin()
        self._engine, self._moderator, self._policies = engine, covering(moderator, policies), policies
        self._quality, self._reading = quality or QualityGate(), reading
        self._windows = windows or Windows()
        self._prompt_check: PromptCheck = prompt_check
        self._clock = clock
        self._reasoning = reasoning or Reasoning()

    async def answer(
        self,
        messages: Sequence[Message],
        sampling: Sampling | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        opening: str = "",
    ) -> GuardedAnswer:
        """The model's answer if it is safe, else a repaired one, else the fallback.

        Args:
            tools: descriptions in OpenAI's form of what the model may call.
            opening: what the answer is made to begin with, such as the beginning of a tool call. The answer's text goes
                on from it and does not hold it; what a consumer puts before it, its ``reading`` has to know.

        Raises:
            EmptyPromptError: no message holds user text.
            EngineError: the model failed, or broke its answer off.
            UnsafeAnswerError: nothing safe and usable was found and the fallback is ``raise``.
        """
        return (await self.report(messages, sampling, tools=tools, opening=opening)).answer

    async def report(
        self,
        messages: Sequence[Message],
        sampling: Sampling | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        opening: str = "",
        judge_all: bool = False,
    ) -> Report:
        """As :meth:`answer`, with the candidates.

        ``judge_all`` measures the usability of the first and the last answer in any case; by default it is
        measured where the decision needs it: on safe answers of a repair.
        """
        return await self._run(Conversation(messages, tools, opening), sampling, held=True, judge_all=judge_all)

    async def stream(
        self,
        messages: Sequence[Message],
        sampling: Sampling | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        opening: str = "",
        release: Release = "window",
    ) -> AsyncGenerator[StreamEvent, None]:
        """The answer as it is checked; the last event is :class:`~tta_middleware.types.Finished`.

        With ``release="window"`` text leaves window by window while decoding goes on, and what has left is never taken
        back: a late flag is repaired by another continuation of it. With ``"end"`` the answer is held until all of it
        was checked. Closing the generator, from any task, stops decoding within one step.

        Raises:
            EmptyPromptError: no message holds user text.
            EngineError: the model failed, or broke its answer off.
            UnsafeAnswerError: nothing safe and usable was found and the fallback is ``raise``.
        """
        talk, held = Conversation(messages, tools, opening), release == "end"

        # A request has task groups and deadlines open while its text leaves. They live in a task of their own, since a
        # consumer may leave this generator at any yield and have it closed from another task.
        async def produce(send: Send) -> None:
            await self._run(talk, sampling, held=held, send=send)

        async with aclosing(owned(produce)) as events:
            async for event in events:
                yield event

    async def _run(
        self,
        conversation: Conversation,
        sampling: Sampling | None,
        *,
        held: bool,
        judge_all: bool = False,
        send: Send | None = None,
    ) -> Report:
        refuse_other_libraries()
        meter, sampling = Meter(self._repair.budget, self._clock), as_sampling(sampling)
        asked = Asked(
            model=self._engine.model_id,
            moderator=self._moderator.name,
            method=method_name(self._repair),
            sampling=sampling,
            stream=not held,
            messages=conversation.messages,
        )
        with observer().answering(asked) as observed:
            await of_part(self._engine.load())
            meter.start()  # with the answer: a model that is still being loaded must not eat up its budget
            context = RequestContext(
                engine=self._engine,
                moderator=self._moderator,
                quality=self._quality,
                policies=self._policies,
                reading=self._reading,
                conversation=conversation,
                sampling=sampling,
                meter=meter,
                observer=observed,
                reasoning=self._reasoning,
                thinks=isinstance(self._engine, ReasoningEngine) and await of_part(self._engine.thinks()),
            )
            with closing(context.scope):
                return await Answering(
                    context=context,
                    repair=self._repair,
                    windows=self._windows,
                    prompt_check=self._prompt_check,
                    held=held,
                    judge_all=judge_all,
                    send=send,
                ).run()


_PARTS = "the engine, method or quality gate"  # whose errors are judged, where no fallback is asked


@dataclass(slots=True, kw_only=True)
class Answering:
    """One request on its way to an answer.

    Attributes:
        windows: how the first answer is released and candidates are cut.
        held: nothing is released before all of it was checked.
        judge_all: the usability of the first and the last answer is measured in any case.
        send: takes what is said, in order; None where nobody listens before the end.
    """

    context: RequestContext
    repair: Repair
    windows: Windows
    prompt_check: PromptCheck
    held: bool
    judge_all: bool
    send: Send | None
    # Two tasks work on a request: one checks the prompt, the other answers. All below belongs to the answering one but
    # _prompt_passed, which the checking one sets and nobody ever clears, and _observed_prompt, which it writes before
    # that. It never reads what the answering one writes, except ``question``, which is there before either begins. A
    # refused prompt is said after both have ended.
    question: Question = field(init=False)
    prompt_tokens: int = 0
    released: str = ""
    thoughts: str = ""
    flagged: Channel | None = None
    closed: str = ""
    thought_score: AnswerScore | None = None
    repairs: int = 0
    seam: int = 0
    baseline: Candidate | None = None
    final: Candidate | None = None
    point: Proposal | None = None
    steps: tuple[StepTrace, ...] = ()
    scores: list[WindowScore] = field(default_factory=list)
    observed: tuple[str, ...] = ()
    _observed_prompt: tuple[str, ...] = ()
    _at: str = _PARTS
    _prompt_passed: anyio.Event = field(default_factory=anyio.Event)

    async def run(self) -> Report:
        """The answer, said and whole. An error is judged first: a part of the user's may quote what it was at."""
        try:
            return await self._run()
        except Exception as error:
            ours = isinstance(error, TTAError) and self._at == _PARTS
            if ours or await self.context.may_be_said(error_texts(error)):
                raise
            raise unquoted(self._at, error) from None

    async def _run(self) -> Report:
        self.question = await self._first_question()
        self.prompt_tokens = len(self.question.prompt.token_ids)
        refused, report = await unless_refused(self._refuse_prompt, self._prompt_passed, self._answer)
        if report is None:
            self.final = None
            self._prompt_passed.set()  # the work has ended; only this is left to say
            report = await self._fall_back(refused)
        self.context.observer.answered(report.answer)
        await self._say(Finished(report.answer))
        return report

    async def _first_question(self) -> Question:
        """The conversation as it is asked first."""
        reasoning = self.context.reasoning
        thought = Thought() if reasoning.mode == "off" and self.context.thinks else None
        prompt = await self.context.embed(thought=thought)
        return Question(prompt, self.context.sampling, "", thought, reasoning.max_tokens)

    async def _next_question(self) -> Question:
        """The conversation as a repair asks it: it goes on from what has left, whose tokens count as answered."""
        thought = self._thought_so_far()
        prompt = await self.context.embed(self.released, thought=thought)
        used = max(0, len(prompt.token_ids) - self.prompt_tokens) if self.released or self.thoughts else 0
        limit = self.context.sampling.max_new_tokens
        left = max(min(limit, LEAST_CONTINUATION), limit - used)
        sampling = replace(self.context.sampling, max_new_tokens=left)
        most = self.repair.reasoning_tokens
        return Question(
            prompt, sampling, self.released, thought, self.context.reasoning.max_tokens if most is None else most
        )

    def _thought_so_far(self) -> Thought | None:
        """How a candidate begins: with what was shown of thoughts, which it may go on with or not."""
        if not self.context.thinks:
            return None
        if self.released or self.context.reasoning.mode == "off" or self.repair.reasoning_tokens == 0:
            return Thought(self.thoughts)
        return Thought(self.thoughts, closed=False) if self.thoughts else None

    async def _refuse_prompt(self) -> str:
        """Why the prompt is refused, empty if it is not; runs beside the first decode steps."""
        if self.prompt_check == "off":
            return ""
        policy = self.context.policies.prompt
        verdicts = None
        try:
            # Not under the first answer's deadline, which ends with that answer: all that is said waits for this check.
            with anyio.move_on_after(self.context.meter.seconds_left):
                verdicts = await self.context.score_conversation(self.prompt_check)
        except ModerationError as error:
            return "" if policy.lets_pass(error) else no_verdict(error)
        if verdicts is None:
            return "budget: seconds"
        decisions = [policy.decide(verdict) for verdict in verdicts]
        found = dict.fromkeys(f"prompt: {decision.category}" for decision in decisions if decision.observed)
        self._observed_prompt = tuple(found)
        return next((f"prompt: {decision.category}" for decision in decisions if decision.flagged), "")

    async def _answer(self) -> Report:
        if limit := self.context.meter.exhausted():
            return await self._fall_back(f"budget: {limit}")
        watch = await self._first_answer()
        if watch.ending == "done" and watch.collected.thoughts_only and not watch.unchecked:
            self.final = self.baseline
            return await self._deliver(watch.completion, "unanswered", f"reasoning: {watch.finish_reason}")
        if watch.ending == "done" and not watch.unchecked:
            self.final = self.baseline
            return await self._deliver(watch.completion, "clean", "clean")
        reason = no_verdict(watch.error) if watch.error else "budget: seconds"
        if watch.ending == "done":
            return await self._deliver(watch.completion, "unchecked", f"{reason}, passed by policy")
        if watch.ending == "flagged" and self.baseline is not None:
            return await self._repaired(self.baseline)
        return await self._fall_back(reason)

    async def _first_answer(self) -> Watch:
        """The unmoved prompt's answer, released as it is checked."""
        proposal = Proposal(self.question.prompt.matrix)
        decode = self.context.decode(self.question, proposal)
        windows = None if self.held else self.windows
        release, think = (kept, kept) if self.held else (self._release, self._think)
        watch = self.context.watch(decode, "output", windows, release, think)
        # A deadline that cuts here closes the stream and drops the open checks; what has left stays.
        with anyio.move_on_after(self.context.meter.seconds_left):
            await watch.run()
        self.scores += watch.windows
        self.observed = tuple(watch.observed)
        if watch.verdict is not None:
            self.baseline = Candidate(proposal, watch.completion, watch.verdict)
        if watch.thought_verdict is not None:
            thoughts = Candidate(proposal, watch.completion, watch.thought_verdict)
            self.thought_score = answer_score(thoughts, self.context.policies.at("reasoning"))
        self.flagged = watch.flagged
        self.closed = "too long" if self.context.meter.closed_thoughts else ""
        return watch

    async def _repaired(self, baseline: Candidate) -> Report:
        if self.repair.method is None:
            return await self._fall_back(NO_METHOD)
        # A candidate that is flagged after a part of it has left moves the seam; the next search goes on from there.
        # The budget ends this: no late flag without a generation.
        while True:
            if limit := self.context.meter.exhausted():
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
        prepared, reason = None, "budget: seconds"
        with anyio.move_on_after(self.context.meter.seconds_left):
            try:
                prepared = await self._prepare(method, baseline)
            except ConfigurationError as error:
                # No room behind what has left, say. The fallback stands then; the user did nothing wrong.
                reason = f"unprepared: {type(error).__name__}"
        # The search has a deadline of its own, which lets it keep the best that it has found.
        if prepared is None:
            return SearchResult(None, None, (), reason)
        optimiser, reach = prepared
        found = await Search(
            self.context,
            self.question,
            optimiser,
            self._delivery(),
            self._on_step,
            free_places=method.needs.free_places,
            reach=reach,
            prefer=self.repair.prefer,
        ).run()
        self.steps += found.steps
        self.scores += [replace(window, repair=self.repairs) for window in found.windows]
        self.final = found.best
        return found

    async def _prepare(self, method: Method, baseline: Candidate) -> tuple[Optimiser, Reach]:
        """What the search of a repair asks for its proposals, and what it looks up for them."""
        decision = self.context.policies.repair.decide(baseline.verdict)
        await self._say(RepairStarted(baseline.verdict.score, decision.category, self.seam))
        before = self.question.thought
        if self.released or self.context.thinks:
            self.question = await self._next_question()
        rng = np.random.default_rng([self.repair.seed & 2**63 - 1, *self.question.prompt.token_ids.tolist()])
        start, reach = await prepare(self.context, self.question, method, decision.excess, rng)
        # With windows the first answer was dropped where it was flagged, and its score is that of a window.
        # An answer without the thoughts that the first one had is another answer.
        thought = self.question.thought
        whole = self.held and thought == before
        optimiser = method.build(replace(start, whole=whole))
        bridged = Bridged(optimiser, await bridge_proposals(self.context, self.question, self.repair.bridges))
        if self.flagged != "reasoning" or self.repairs > 1 or thought is None or not thought.closed:
            return bridged, reach
        self.closed = "flagged"
        # What was flagged is a thought that the answer now does without: the unmoved prompt may do.
        return Led(Proposal(self.question.prompt.matrix, label="thought closed"), bridged), reach

    def _delivery(self) -> Delivery:
        """Candidates flow if the first answer did; their first window is what a choice is made on."""
        commit = self.repair.commit
        emit, think = (None, None) if self.held else (self._release, self._think)
        if commit is None:
            return Delivery(self.windows, emit=emit, think=think)
        first = self.windows.model_copy(update={"first": commit, "largest": max(commit, self.windows.largest)})
        return Delivery(first, commit=True, emit=emit, think=think)

    async def _on_step(self, step: StepTrace) -> None:
        await self._say(RepairStep(step))

    async def _finish_repair(self, completion: Completion, outcome: Outcome, stop_reason: str) -> Report:
        await self._say(RepairFinished(outcome, stop_reason))
        return await self._deliver(completion, outcome, stop_reason)

    async def _give_up(self, stop_reason: str) -> Report:
        """Nothing safe and usable was found, or nothing was tried."""
        if self.repairs:
            await self._say(RepairFinished("blocked", stop_reason))
        return await self._fall_back(stop_reason)

    async def _fall_back(self, stop_reason: str) -> Report:
        """What has left stays; after it comes the notice, or what the fallback says."""
        # An exception leaves as well as a text does, and a fallback of the user's is not called twice.
        await self._prompt_passed.wait()
        fallback, context = self.repair.fallback, self.context
        trace = await self._trace("blocked", stop_reason)
        if fallback == "raise":
            raise UnsafeAnswerError(refusal_of(stop_reason), trace)
        text = self._after_what_left(context.policies.output.notice_for(context.conversation.user_text))
        if callable(fallback):
            # Of the user's function and its check no deadline is kept: without them nothing could be said at all.
            text = await self._checked_fallback(fallback) or text
            meter = self.context.meter
            trace = replace(trace, moderation_calls=meter.moderation_calls, seconds=meter.seconds)
        await self._say(Released(text))
        answer = GuardedAnswer(self.released, "content_filter", trace, self.prompt_tokens, self.thoughts)
        return Report(answer, self.baseline, self.final)

    async def _checked_fallback(self, fallback: FallbackFunction) -> str:
        """What the fallback adds, moderated by itself and as the end of the answer; empty where that fails."""
        self._at = "the fallback"
        text = await of_part(said_by(fallback, self.context.conversation.messages))
        self._at = _PARTS
        added = self._after_what_left(text)
        return added if await self.context.may_be_said(dict.fromkeys((text, self.released + added))) else ""

    def _after_what_left(self, text: str) -> str:
        return f"{SEAM}{text}" if self.released else text

    async def _deliver(self, completion: Completion, outcome: Outcome, stop_reason: str) -> Report:
        await self._prompt_passed.wait()
        if self.held:
            await self._think(completion.reasoning)
        if rest := completion.text[len(self.released) :]:
            await self._say(Released(rest))
        trace = await self._trace(outcome, stop_reason)
        # An answer that its engine broke off does not come here; see RequestContext.decode.
        finish: Literal["stop", "length"] = "length" if completion.finish_reason == "length" else "stop"
        answer = GuardedAnswer(self.released, finish, trace, self.prompt_tokens, self.thoughts)
        return Report(answer, self.baseline, self.final)

    async def _release(self, text: str) -> bool:
        await self._say(Released(text))
        return True

    async def _think(self, text: str) -> bool:
        """Checked thoughts: given out where they are shown."""
        if text and self.context.reasoning.mode == "show":
            await self._say(Released(text, "reasoning"))
        return True

    async def _say(self, event: StreamEvent) -> None:
        """The one way out: nothing is said before the prompt has passed its check, whoever says it.

        The first answer's watch and a search never speak at the same time; a search ends before its repair goes on.
        Between the gate and ``send``, which takes the event before it waits, nothing is awaited: so ``released`` is
        what has left, even if the deadline cuts whoever waits there for a slow consumer.
        """
        if not self._prompt_passed.is_set():
            await self._prompt_passed.wait()
        if isinstance(event, Released):
            self.released += event.text if event.channel == "answer" else ""
            self.thoughts += event.text if event.channel == "reasoning" else ""
            self.context.observer.released()
        if self.send is not None:
            await self.send(event)

    async def _trace(self, outcome: Outcome, stop_reason: str) -> Trace:
        policies, meter = self.context.policies, self.context.meter
        unmoved = self.final is self.baseline
        if self.judge_all:
            self.baseline = await self._with_quality(self.baseline)
            self.final = self.baseline if unmoved else await self._with_quality(self.final)
        point = self.point or (self.final.proposal if self.final else None)
        cosine, relative, decodes = 1.0, 0.0, True
        if outcome != "blocked" or meter.seconds_left != 0.0:  # what is blocked for want of time ends at once
            cosine, relative, decodes = await move_of(self.context.engine, self.question.prompt, point)
        return Trace(
            method=method_name(self.repair),
            outcome=outcome,
            stop_reason=stop_reason,
            baseline=answer_score(self.baseline, policies.output),
            final=answer_score(self.final, policies.output if unmoved else policies.repair),
            generations=meter.generations,
            generated_tokens=meter.generated_tokens,
            moderation_calls=meter.moderation_calls,
            seconds=meter.seconds,
            steps=self.steps,
            cosine=cosine,
            relative_move=relative,
            decodes_to_original=decodes,
            seed=self.repair.seed,
            moderator=self.context.moderator.name,
            model=self.context.engine.model_id,
            repairs=self.repairs,
            seam=self.seam,
            move=point.label if point else "",
            load_seconds=meter.load_seconds,
            windows=tuple(self.scores),
            reasoning=self.context.reasoning_trace(self.thought_score, self.closed),
            mode=policies.mode,
            observed=(*self._observed_prompt, *self.observed),
        )

    async def _with_quality(self, candidate: Candidate | None) -> Candidate | None:
        if candidate is None or candidate.quality is not None:
            return candidate
        report = await self.context.assess(self.question.prompt, candidate.completion)
        return replace(candidate, quality=report)


def method_name(repair: Repair) -> str:
    """The method's name; ``none`` where there is no repair."""
    return repair.method.name if repair.method else "none"
