"""What was scored for one answer or tool result of a model of somebody else's, and what came of it."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

from tta_middleware.call_text import error_texts, json_reading
from tta_middleware.errors import ModerationError, unquoted
from tta_middleware.moderation.parts import InParts
from tta_middleware.moderation.wrapper import Wrapper
from tta_middleware.observing import AnswerObserver, AnyStage, CheckObserver, observer
from tta_middleware.policy import Decision, Policy, StagePolicies
from tta_middleware.policy.coverage import categories_of, covering, enforced, grows, reads_rules, told, undisguises
from tta_middleware.policy.verdicts import verdicts_on
from tta_middleware.protocols import Moderator
from tta_middleware.trace import no_verdict
from tta_middleware.types import (
    CATEGORIES,
    SEAM,
    AnswerScore,
    ModerationContext,
    Outcome,
    ReasoningTrace,
    Subject,
    Trace,
    Verdict,
    WindowScore,
)

_logger = logging.getLogger(__name__)

_STAGES: Mapping[Subject, AnyStage] = {"answer": "output", "prompt": "prompt", "tool result": "tool_result"}

LONGEST = 8_000
"""Characters of one text for a moderator that does not say what it takes: a tool may bring a whole book."""


@dataclass(slots=True, eq=False)
class Ledger:
    """A moderator that keeps the books for one guarded call.

    Attributes:
        subject: what the texts are.
        approved: texts that may be shown; a message that holds others has not been through this guard.
        error: why a text could not be scored, if one could not.
        observed: categories for which something would have been withheld, had the policy done more than observe.
        observer: told of each request to the moderator; None where the texts are part of no answer that is being made.
        stage: what telemetry calls the texts; None goes by the subject.
        around: requests to the moderator are made inside of what it gives.
    """

    moderator: Moderator
    policy: Policy
    subject: Subject = "answer"
    clock: Callable[[], float] = time.monotonic
    approved: set[str] = field(default_factory=set)
    calls: int = 0
    error: ModerationError | None = None
    observed: dict[str, None] = field(default_factory=dict)
    observer: AnswerObserver | None = None
    stage: AnyStage | None = None
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    name: str = field(init=False)
    default_threshold: float = field(init=False)
    categories: tuple[str, ...] = field(init=False)
    undisguises: bool = field(init=False)
    grows: bool = field(init=False)
    reads_rules: bool = field(init=False)
    _covering: Moderator = field(init=False)
    _worst: tuple[Decision, Verdict] | None = None
    _started: float = 0.0

    def __post_init__(self) -> None:
        stages = StagePolicies.of(self.policy)
        if getattr(self.moderator, "max_characters", None) is None:
            self.moderator = InParts(self.moderator, LONGEST)
        self._covering = covering(self.moderator, stages)
        self.moderator = told(self._covering, self.policy, self.subject)
        self.grows, self.reads_rules = grows(self._covering), reads_rules(self._covering)
        self.name, self.default_threshold = self.moderator.name, self.moderator.default_threshold
        # What is not declared was put under watch above, so whoever asks this ledger need not watch it again.
        self.categories = categories_of(self.moderator) or tuple(enforced(stages))
        self.undisguises = undisguises(self.moderator)
        self._started = self.clock()

    def in_context(self, context: ModerationContext) -> Ledger:
        """This very ledger, whose texts belong to that request from now on; what they are it knows itself."""
        self.moderator = told(
            self._covering, self.policy, self.subject, conversation=context.conversation, scope=context.scope
        )
        return self

    def of_window(self, end: int) -> Moderator:
        """This very ledger, asked about the window that ends ``end`` characters into the answer."""
        return _OfWindow(self, end)

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        """The moderator's verdicts, counted; blank texts are safe without a call.

        Raises:
            ModerationError: the moderator's.
        """
        return await self.verdicts(texts, prompt)

    async def verdicts(self, texts: Sequence[str], prompt: str | None, end: int | None = None) -> list[Verdict]:
        """As :meth:`moderate`; ``end`` is how much of the answer the texts cover, where they are one window of it."""
        asked = [text for text in texts if text.strip()]
        try:
            verdicts = iter(await self._ask(asked, prompt, end) if asked else ())
        except ModerationError as error:
            self.error = error
            raise
        return [next(verdicts) if text.strip() else _blank(self.name) for text in texts]

    async def _ask(self, texts: Sequence[str], prompt: str | None, end: int | None) -> list[Verdict]:
        self.calls += 1
        with self._checking() as check, self.around():
            verdicts = await verdicts_on(self.moderator, texts, prompt=prompt)
            for verdict in verdicts:
                check.scored(verdict, self.policy, end)
        for verdict in verdicts:
            decision = self.policy.decide(verdict)
            if decision.observed:
                self.observed[decision.category] = None
            if self._worst is None or decision.excess > self._worst[0].excess:
                self._worst = (decision, verdict)
        return verdicts

    def _checking(self) -> AbstractContextManager[CheckObserver]:
        stage = self.stage or _STAGES[self.subject]
        if self.observer is None:
            return observer().checking_alone(self.name, stage)
        return self.observer.checking(stage)

    async def passes(self, texts: Sequence[str], prompt: str | None = None) -> bool:
        """Whether all texts may be shown, as they are written and as a parser of JSON reads them.

        What could not be scored passes only if the policy says so.
        """
        new = [text for text in texts if text not in self.approved]
        read = [decoded for text in new if (decoded := json_reading(text)) is not None]
        try:
            verdicts = await self.moderate([*new, *read], prompt=prompt) if new else []
        except ModerationError as error:
            safe = self.policy.lets_pass(error)
        else:
            decisions = [self.policy.decide(verdict) for verdict in verdicts]
            safe = not any(decision.flagged for decision in decisions)
            told_of({decision.category for decision in decisions if decision.observed})
        if safe:
            self.approved.update(new)
        return safe

    async def shows(self, error: Exception) -> bool:
        """Whether an error's text passes, with those behind it: callbacks, tracers and callers get to see them."""
        return await self.passes(error_texts(error))

    @asynccontextmanager
    async def judged_errors(self, part: str) -> AsyncIterator[None]:
        """What ``part`` raises inside leaves if it :meth:`shows`.

        Raises:
            EngineError: in place of an error that may not be shown; it names ``part`` and quotes nothing.
        """
        try:
            yield
        except Exception as error:
            if await self.shows(error):
                raise
            raise unquoted(part, error) from None

    async def passes_behind(self, said: str, text: str) -> bool:
        """As :meth:`passes`: what stands in for the rest of an answer, by itself and as the end of what has left."""
        return await self.passes([text, said + SEAM + text] if said.strip() else [text])

    async def aclose(self) -> None:
        """The moderator belongs to the caller."""

    @property
    def outcome(self) -> Outcome:
        """Of an answer that was released."""
        return "clean" if self.error is None else "unchecked"

    def reason(self, part: str) -> str:
        """Why an answer was withheld: the part that was flagged, or the moderator's failure."""
        return f"flagged: {part}" if self.error is None else no_verdict(self.error)

    def trace(
        self, outcome: Outcome, stop_reason: str, *, method: str, model: str = "", tokens: int = 0, released: int = 0
    ) -> Trace:
        """The trace of this call; ``released`` characters had left when the rest was withheld, if it was."""
        return trace_of_one(
            outcome,
            stop_reason,
            self.score(),
            method=method,
            moderator=self,
            model=model,
            tokens=tokens,
            calls=self.calls,
            seconds=self.clock() - self._started,
            released=released,
            mode=self.policy.mode,
            observed=(f"output: {category}" for category in self.observed),
        )

    def score(self) -> AnswerScore | None:
        """The worst verdict of all; None where nothing was scored."""
        return None if self._worst is None else score_of(*self._worst)


class _OfWindow(Wrapper):
    """A ledger that is asked about one window."""

    def __init__(self, ledger: Ledger, end: int) -> None:
        super().__init__(ledger)
        self._ledger, self._end = ledger, end

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        return await self._ledger.verdicts(texts, prompt, self._end)


def trace_of_one(
    outcome: Outcome,
    stop_reason: str,
    score: AnswerScore | None,
    *,
    method: str,
    moderator: Moderator,
    model: str,
    tokens: int,
    calls: int,
    seconds: float,
    released: int,
    mode: Literal["enforce", "observe"],
    observed: Iterable[str],
    windows: Iterable[WindowScore] = (),
    reasoning: ReasoningTrace | None = None,
) -> Trace:
    """The trace of an answer that was written in one go: what was flagged of it has no score that it left with.

    Args:
        released: characters that had left when the rest was withheld, if it was.
    """
    blocked = outcome == "blocked"
    return Trace(
        method=method,
        outcome=outcome,
        stop_reason=stop_reason,
        baseline=score,
        final=None if blocked else score,
        generations=1,
        generated_tokens=tokens,
        moderation_calls=calls,
        seconds=seconds,
        moderator=moderator.name,
        model=model,
        seam=released if blocked else 0,
        windows=tuple(windows),
        reasoning=reasoning,
        mode=mode,
        observed=tuple(observed),
    )


def score_of(decision: Decision, verdict: Verdict) -> AnswerScore:
    """A verdict as traces report it."""
    return AnswerScore(verdict.score, decision.reached, decision.category, shadowed=decision.shadowed)


def told_of(observed: Iterable[str]) -> None:
    """Log the categories for which a text would have been withheld: not every way out has a trace that says so."""
    for category in observed:
        _logger.warning("observed: a text would have been withheld for %s; the policy enforces nothing", category)


def _blank(name: str) -> Verdict:
    return Verdict(dict.fromkeys(CATEGORIES, 0.0), flagged=False, model=name)
