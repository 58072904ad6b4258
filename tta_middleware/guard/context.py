"""The context of one request: its conversation, the parts it works with, and what it has cost.

Whatever a request asks of the engine, the moderator or the quality gate, it asks through its :class:`RequestContext`,
so that each prompt holds the request's tools and each call stands on its meter.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, cast

from tta_middleware.call_text import json_reading, message_texts
from tta_middleware.config import Budget, Reasoning, Windows
from tta_middleware.errors import ConfigurationError, EngineError, ModerationError
from tta_middleware.guard.holdback import Check, HoldBack, Reading
from tta_middleware.guard.quality import echoes, repeats
from tta_middleware.guard.settings import PromptCheck, check_scorer
from tta_middleware.guard.watch import Watch, Way, of_part
from tta_middleware.observing import NOBODY, AnswerObserver, CheckStage
from tta_middleware.policy import Policy, StagePolicies
from tta_middleware.policy.coverage import grows, told
from tta_middleware.policy.policy import Stage
from tta_middleware.policy.verdicts import verdict_on, verdicts_on
from tta_middleware.protocols import Engine, Moderator, Quality, ReasoningEngine
from tta_middleware.trace import not_checked
from tta_middleware.types import (
    AbortSignal,
    AnswerScore,
    Completion,
    FinishReason,
    GenerationRequest,
    Message,
    PromptEmbeddings,
    Proposal,
    QualityReport,
    ReasoningTrace,
    RequestScope,
    Sampling,
    Subject,
    TextDelta,
    Thought,
    Verdict,
    as_asked,
    next_ticket,
)

Clock: TypeAlias = Callable[[], float]

NO_METHOD = "no repair method"
"""Why the work ended where nothing is searched for."""

_SEED_MASK = 2**63 - 1


def check_parts(engine: object, moderator: object) -> None:
    """Whether these can be an engine and a moderator; a mistake shows somewhere within the first answer otherwise.

    Raises:
        ConfigurationError: one is a name, or lacks what it needs.
    """
    if isinstance(engine, str) or isinstance(moderator, str):
        raise ConfigurationError(
            'a guard takes parts, not names: TransformersEngine("smollm2"), EmbeddedModerator(); '
            'TTAChatModel(model="smollm2", moderator="local") takes names'
        )
    if not hasattr(engine, "embed"):
        raise ConfigurationError(f"{type(engine).__name__} is no Engine (tta_middleware.protocols)")
    check_scorer(moderator)


def as_sampling(given: Any) -> Sampling:
    """How is decoded, by default greedily; raises ConfigurationError for another kind of settings."""
    if given is not None and not isinstance(given, Sampling):
        raise ConfigurationError(f"sampling is Sampling(temperature=...), not {given!r:.40}")
    return given or Sampling()


def refusal_of(stop_reason: str) -> str:
    """What an error says where the fallback is to raise: what happened, and what to do."""
    if withheld := not_checked(stop_reason):
        return withheld
    if stop_reason.startswith("prompt: "):
        return f"the prompt was flagged ({stop_reason}); ask something else, or set fallback='refuse'"
    if stop_reason == NO_METHOD:
        return "the answer was flagged, and there is no repair method; choose one, or set fallback='refuse'"
    return (
        f"no safe and usable answer within the budget ({stop_reason}); "
        "raise the budget, choose another method, or set fallback='refuse'"
    )


@dataclass(frozen=True, slots=True)
class Conversation:
    """What is answered.

    Attributes:
        messages: the turns so far; where no user says anything, the last instruction is a user's.
        tools: descriptions in OpenAI's form of what the model may call; every prompt of the request shows them.
        opening: what the answer is made to begin with. The model goes on from it; the answer's text does not hold it.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()
    opening: str = ""

    def __post_init__(self) -> None:
        """Instructions alone become a question.

        Raises:
            ConfigurationError: another form of a conversation, which fails somewhere within otherwise.
        """
        given: Any = self.messages
        wrong = [given] if isinstance(given, str | Mapping) else [one for one in given if not isinstance(one, Message)]
        if wrong:
            raise ConfigurationError(
                f'a conversation is a list of Message, such as [Message("user", "Hello")], and holds no '
                f"{type(wrong[0]).__name__}; TTAChatModel takes texts and LangChain's messages"
            )
        object.__setattr__(self, "messages", as_asked(self.messages))

    @property
    def user_text(self) -> str:
        return last_user_text(self.messages)


def last_user_text(messages: Sequence[Message]) -> str:
    """The last user turn's words; empty if there is none."""
    return next((message.content for message in reversed(messages) if message.role == "user"), "")


def reminded(messages: Sequence[Message], reminder: str) -> list[Message]:
    """The conversation with ``reminder`` at the end of its first system message, or as one where it has none."""
    if messages and messages[0].role == "system":
        return [Message("system", f"{messages[0].content}\n\n{reminder}"), *messages[1:]]
    return [Message("system", reminder), *messages]


@dataclass(slots=True)
class Meter:
    """What one answer has cost so far.

    The tasks of a request all count here. They share one event loop and no count awaits anything between its reading
    and its writing, so none is lost.

    Attributes:
        generations: answers that were begun, the first one included.
        generated_tokens: counted as they come, so those of an aborted decode are, too.
        moderation_calls: counted before the call, so one that fails or is cancelled is, too.
        reasoning_tokens: those of ``generated_tokens`` that were thought.
        closed_thoughts: thoughts that were too long and ended by the guard.
    """

    budget: Budget
    clock: Clock = time.monotonic
    generations: int = 0
    generated_tokens: int = 0
    moderation_calls: int = 0
    reasoning_tokens: int = 0
    closed_thoughts: int = 0
    called: float = field(init=False)
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.called = self.started = self.clock()

    def start(self) -> None:
        """From here on seconds count; what went before was loading."""
        self.started = self.clock()

    @property
    def load_seconds(self) -> float:
        return self.started - self.called

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
class Question:
    """One prompt as it is asked: unmoved embeddings and sampling.

    Attributes:
        prefix: what has left of the answer, which ``prompt`` holds at its end.
        thought: what the answer has thought already, before that; None leaves it to the model.
        reasoning_tokens: how long it may think; None leaves it the answer's own limit.
    """

    prompt: PromptEmbeddings
    sampling: Sampling
    prefix: str = ""
    thought: Thought | None = None
    reasoning_tokens: int | None = None


def generation_request(
    question: Question, proposal: Proposal, generation: int, ticket: int | None = None, patience: float = 0.0
) -> GenerationRequest:
    """What the engine is asked for a proposal; every ``generation`` of an answer has a seed of its own."""
    sampling = replace(question.sampling, seed=(question.sampling.seed + generation) & _SEED_MASK)
    if proposal.temperature is not None:
        sampling = replace(sampling, temperature=proposal.temperature)
    prompt = (proposal.prompt or question.prompt).moved(proposal.matrix)
    return GenerationRequest(prompt, sampling, ticket=ticket, patience=patience)


def check_ended(*reasons: FinishReason | None) -> None:
    """Refuse answers that nobody stopped and that have no end of their own: a part must not pass for the whole.

    Raises:
        EngineError: the engine broke an answer off.
    """
    if any(reason not in ("stop", "length") for reason in reasons):
        raise EngineError("the engine broke the answer off before its end; ask again")


@dataclass(frozen=True, slots=True, eq=False)
class Decode:
    """One answer of the engine's: what comes of it, counted as it comes, and the signal that stops it."""

    question: Question
    deltas: AsyncGenerator[TextDelta, None]
    abort: AbortSignal


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RequestContext:
    """One request's parts, conversation and meter. Only the meter and ``reminders`` change.

    Attributes:
        policies: with a threshold in every stage.
        reading: what consumers make of an answer; whatever of it is scored, is scored as it was written and so.
        reasoning: how the model is let think, and what becomes of its thoughts.
        thinks: whether its thoughts can be told from its answers.
        ticket: that of all the request's sequences; engines that cannot take all at once take lower ones first.
        observer: told of each check and wave.
        scope: the request's life, which ends with its answer.
        reminders: what a repair tells the model; written by its search, before any candidate begins.
    """

    engine: Engine
    moderator: Moderator
    quality: Quality
    policies: StagePolicies
    reading: Reading
    conversation: Conversation
    sampling: Sampling
    meter: Meter
    reasoning: Reasoning = field(default_factory=Reasoning)
    thinks: bool = False
    ticket: int = field(default_factory=next_ticket)
    observer: AnswerObserver = NOBODY
    scope: RequestScope = field(default_factory=RequestScope)
    reminders: dict[str, None] = field(default_factory=dict)
    # Filled by the request's tasks, which share one event loop; what is made twice is equal.
    _told: dict[tuple[Subject, CheckStage], Moderator] = field(default_factory=dict)

    def moderator_for(self, subject: Subject, stage: CheckStage) -> Moderator:
        """The moderator, told what the texts are and what the policy of ``stage`` does not allow."""
        if (subject, stage) not in self._told:
            turns = self.conversation.messages if subject == "answer" else ()
            self._told[subject, stage] = told(
                self.moderator, self._policy(stage), subject, conversation=turns, scope=self.scope
            )
        return self._told[subject, stage]

    def _policy(self, stage: CheckStage) -> Policy:
        return self.policies.output if stage == "fallback" else self.policies.at(stage)

    @property
    def checks_thoughts(self) -> bool:
        """Whether thoughts are scored: those that are shown in any case."""
        return self.reasoning.mode == "show" or self.policies.hidden_reasoning == "checked"

    def reasoning_trace(self, score: AnswerScore | None, closed: str) -> ReasoningTrace | None:
        """What became of the model's thoughts; None where it had none."""
        tokens = self.meter.reasoning_tokens
        return ReasoningTrace(self.reasoning.mode, tokens, self.checks_thoughts, score, closed) if tokens else None

    async def embed(
        self, prefix: str = "", messages: Sequence[Message] | None = None, thought: Thought | None = None
    ) -> PromptEmbeddings:
        """The conversation, or ``messages`` in its place, as a prompt that goes on from what has left.

        Raises:
            EmptyPromptError: no message holds user text.
            ConfigurationError: the model does not take the conversation, its length, its tools or the arguments of its
                chat template.
        """
        talk = self.conversation
        begun, more = talk.opening + prefix, dict[str, Any]()
        if talk.tools:
            more["tools"] = talk.tools
        if thought is not None and self.thinks:
            more["thought"] = thought
        if self.reasoning.template:
            more["template"] = self._template_arguments()
        turns = talk.messages if messages is None else messages
        prompt = await of_part(self.engine.embed(turns, assistant_prefix=begun, **more))
        return replace(prompt, assistant_prefix=begun) if begun else prompt

    def _template_arguments(self) -> Mapping[str, Any]:
        if not isinstance(self.engine, ReasoningEngine):
            raise ConfigurationError(
                f"the engine of {self.engine.model_id!r} takes no arguments of a chat template; leave them out"
            )
        return self.reasoning.template

    def decode(self, question: Question, proposal: Proposal) -> Decode:
        """One generation. Nothing is decoded before its deltas are asked for."""
        request = self._next_request(question, proposal)
        return self._decode(question, proposal, request, self.engine.stream(request))

    def decode_all(self, question: Question, proposals: Sequence[Proposal], patience: float = 0.0) -> list[Decode]:
        """One generation per proposal, side by side; see :class:`~tta_middleware.types.GenerationRequest`."""
        requests = [self._next_request(question, proposal, patience) for proposal in proposals]
        streams = self.engine.stream_batch(requests)
        return [self._decode(question, *parts) for parts in zip(proposals, requests, streams, strict=True)]

    def _next_request(self, question: Question, proposal: Proposal, patience: float = 0.0) -> GenerationRequest:
        request = generation_request(question, proposal, self.meter.generations, self.ticket, patience)
        self.meter.generations += 1
        return request

    def _decode(
        self,
        question: Question,
        proposal: Proposal,
        request: GenerationRequest,
        stream: AsyncGenerator[TextDelta, None],
    ) -> Decode:
        metered = self._metered(stream, request.abort, proposal.opening)
        if self.thinks and question.reasoning_tokens is not None:
            metered = self._thinking_within(question.reasoning_tokens, metered, request)
        return Decode(question, metered, request.abort)

    async def _thinking_within(
        self, most: int, source: AsyncGenerator[TextDelta, None], request: GenerationRequest
    ) -> AsyncGenerator[TextDelta, None]:
        """``source``; where it thinks for more than ``most`` tokens the thought is closed there, and it has to answer.

        Raises:
            EngineError, ConfigurationError: what embedding the thought, or going on from it, raises.
        """
        ids, thought = list[int](), 0
        async with aclosing(source):
            async for delta in source:
                thought += len(delta.token_ids) if delta.channel == "reasoning" else 0
                if thought > most and delta.channel == "reasoning" and delta.finish_reason is None:
                    break
                ids += delta.token_ids
                yield delta
            else:
                return
        self.meter.closed_thoughts += 1
        closed = await cast(ReasoningEngine, self.engine).close_thought(request.prompt, ids)
        # The mark is a part of the answer's tokens, but nobody decoded it.
        yield TextDelta(
            "", tuple(closed.token_ids[len(request.prompt.token_ids) + len(ids) :].tolist()), None, "reasoning"
        )
        left = replace(request.sampling, max_new_tokens=max(1, request.sampling.max_new_tokens - len(ids)))
        rest = self.engine.stream(replace(request, prompt=closed, sampling=left))
        async with aclosing(self._metered(rest, request.abort, "")) as deltas:
            async for delta in deltas:
                yield delta

    async def _metered(
        self, source: AsyncGenerator[TextDelta, None], abort: AbortSignal, opening: str
    ) -> AsyncGenerator[TextDelta, None]:
        """``opening`` and the stream, its tokens on the meter.

        Raises:
            EngineError: the engine broke the answer off by itself.
        """
        reason: FinishReason | None = None
        try:
            if opening:
                yield TextDelta(opening)
            async for delta in source:
                self.meter.generated_tokens += len(delta.token_ids)
                self.meter.reasoning_tokens += len(delta.token_ids) if delta.channel == "reasoning" else 0
                reason = delta.finish_reason
                if reason != "aborted" or abort.is_set():
                    yield delta
        finally:
            # Here and not at the next collection: whoever closes the metered stream means the engine's.
            await source.aclose()
        if not abort.is_set():
            check_ended(reason)

    def watch(
        self,
        decode: Decode,
        stage: Stage,
        windows: Windows | None,
        release: Callable[[str], Awaitable[bool]],
        think: Callable[[str], Awaitable[bool]],
    ) -> Watch:
        """A watch over one decode by the policy of its stage, whose checks go on the meter.

        ``think`` takes thoughts as ``release`` takes text.
        """
        asked, thought = decode.question, decode.question.thought
        answer = self._way(stage, windows, self.reading, release, asked.prefix)
        if not self.checks_thoughts:
            return Watch(decode.deltas, answer)
        begun = thought.text if thought is not None else ""
        return Watch(decode.deltas, answer, self._way("reasoning", windows, json_reading, think, begun))

    def _way(
        self,
        stage: Stage,
        windows: Windows | None,
        reading: Reading,
        release: Callable[[str], Awaitable[bool]],
        begun: str,
    ) -> Way:
        async def check(window: Check) -> Verdict:
            return await self.score(window.text, window.decoded, stage=stage, end=window.end)

        cut = windows.over_all() if windows is not None and grows(self.moderator) else windows

        def hold(prefix: str) -> HoldBack:
            return HoldBack(cut, prefix, reading)

        return Way(hold, self.policies.at(stage), check, release, begun)

    async def score(
        self, text: str, decoded: str | None = None, *, stage: CheckStage = "output", end: int | None = None
    ) -> Verdict:
        """One moderation request for a text and for what it says once decoded.

        ``stage`` and ``end``, how much of the answer the text brings to its check, are for the observer.

        Raises:
            ModerationError: the text has no verdict.
        """
        self.meter.moderation_calls += 1
        with self.observer.checking(stage) as check:
            moderator = self.moderator_for("answer", stage)
            verdict = await verdict_on(moderator, text, decoded, prompt=self.conversation.user_text)
            check.scored(verdict, self._policy(stage), end)
        return verdict

    async def score_prompt(self, texts: Sequence[str], subject: Subject = "prompt") -> list[Verdict]:
        """One moderation request for what the user wrote, or for what tools gave back.

        Raises:
            ModerationError: a text has no verdict.
        """
        self.meter.moderation_calls += 1
        with self.observer.checking("prompt") as check:
            verdicts = await verdicts_on(self.moderator_for(subject, "prompt"), texts)
            for verdict in verdicts:
                check.scored(verdict, self.policies.prompt)
        return verdicts

    async def score_conversation(self, which: PromptCheck) -> list[Verdict]:
        """As :meth:`score_prompt`: the last user turn, or all turns, of which tools' results may be asked about apart.

        Raises:
            ModerationError: a text has no verdict.
        """
        if which == "user":
            return await self.score_prompt([self.conversation.user_text])
        said, results = list[str](), list[str]()
        for message in self.conversation.messages:
            (results if message.role == "tool" else said).extend(message_texts(message))
        # Apart only where the moderator makes a difference.
        if not results or self.moderator_for("prompt", "prompt") is self.moderator_for("tool result", "prompt"):
            return await self.score_prompt([*said, *results])
        return [*await self.score_prompt(said), *await self.score_prompt(results, "tool result")]

    async def may_be_said(self, texts: Iterable[str]) -> bool:
        """Whether texts that are no model's, a fallback's say, pass as an answer would; unscored ones do not."""
        try:
            for text in texts:
                verdict = await self.score(text, self.reading(text, 0), stage="fallback")
                if self.policies.output.decide(verdict).flagged:
                    return False
        except ModerationError:
            return False
        return True

    async def assess(self, prompt: PromptEmbeddings, completion: Completion) -> QualityReport:
        """Whether an answer to the unmoved ``prompt`` is usable, and says something of its own."""
        [report] = await of_part(self.quality.assess(self.engine, prompt, [completion]))
        return replace(report, problems=("echo",)) if report.usable and self._echoes(prompt, completion) else report

    def _echoes(self, prompt: PromptEmbeddings, completion: Completion) -> bool:
        """Whether an answer only says over again what was said to the model, or by it before."""
        text, over = completion.text, completion.finish_reason == "stop"
        instructions = (message.content for message in self.conversation.messages if message.role == "system")
        if any(echoes(text, heard, over=over) for heard in (self.conversation.user_text, *instructions)):
            return True
        return any(repeats(text, said) for said in (*self.reminders, prompt.assistant_prefix))
