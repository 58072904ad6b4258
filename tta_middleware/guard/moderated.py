"""The same windows over a stream of any other model: checked text out, nothing repaired."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable
from contextlib import aclosing, closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from tta_middleware.aio.streams import Send, close_all, owned
from tta_middleware.config import Windows
from tta_middleware.errors import ConfigurationError, FlaggedError
from tta_middleware.guard.holdback import Check, HoldBack
from tta_middleware.guard.ledger import Ledger, score_of, told_of, trace_of_one
from tta_middleware.guard.settings import check_kind, check_scorer
from tta_middleware.guard.watch import Watch, Way
from tta_middleware.observing import NOBODY, AnswerObserver, Asked, CheckStage, observer
from tta_middleware.policy import Policy, StagePolicies
from tta_middleware.policy.coverage import covering, grows, told
from tta_middleware.policy.verdicts import verdict_on
from tta_middleware.protocols import Moderator
from tta_middleware.trace import no_verdict
from tta_middleware.types import (
    GuardedAnswer,
    Message,
    Outcome,
    ReasoningTrace,
    RequestScope,
    TextDelta,
    Trace,
    Verdict,
    WindowScore,
)


@dataclass(frozen=True, slots=True)
class Thoughts:
    """How the thoughts of a stream are checked, and where they go.

    Attributes:
        release: takes checked thoughts, in order; while it waits, so does the stream.
    """

    moderator: Moderator
    policy: Policy
    release: Callable[[str], Awaitable[None]]


async def moderated(
    source: AsyncIterable[str | TextDelta],
    moderator: Moderator,
    policy: Policy | None = None,
    *,
    windows: Windows | None = None,
    hold: bool = False,
    prompt: str | None = None,
    scored: list[WindowScore] | None = None,
    thoughts: Thoughts | None = None,
    model: str = "",
    behind: str = "",
) -> AsyncGenerator[str, None]:
    """Yield the text of ``source`` as it is checked; with ``hold``, all of it once it was checked to its end.

    The moderator works while ``source`` goes on; its last check sees the whole text, before that windows with
    ``windows.context`` characters before them. Under a policy that only observes all of it is yielded, and a warning in
    the log names what would have been withheld. Closing the generator closes ``source`` if that can be closed.
    ``scored`` takes what was decided of each window, as it comes. Telemetry hears of it as of an answer of ``model``;
    from a :class:`~tta_middleware.guard.ledger.Ledger`, which knows the answer that it keeps books on, it hears itself.

    Pieces of ``source`` in the channel ``reasoning`` are no part of the text: they go to ``thoughts``, and without that
    nowhere. What follows a thought is yielded after all of that has passed.

    ``behind`` is what has left before and was checked: the text is judged as what goes on from it.

    Raises:
        FlaggedError: a window was flagged. What was yielded before it was checked and stays.
        ConfigurationError: the policy has a threshold for a category that the moderator does not score.
        ModerationError: a window has no verdict and the policy is ``on_error="closed"``.
        Exception: what ``source`` raises.
    """
    if not hasattr(source, "__aiter__"):
        raise ConfigurationError(f"source is an async iterable of texts, not {type(source).__name__}")
    if not isinstance(moderator, Ledger):
        check_scorer(moderator)
    check_kind("windows", windows, Windows, "Windows(first=..., largest=...)")
    in_force = _in_force(moderator, policy)
    cut = None if hold else windows or Windows()
    scope = RequestScope()
    windows_scored = [] if scored is None else scored
    stream = _Stream(source, moderator, in_force, cut, prompt, thoughts, model, scope, windows_scored, behind)
    with closing(scope):
        async with aclosing(owned(stream.run)) as pieces:
            async for piece in pieces:
                yield piece


@dataclass(slots=True, eq=False)
class _Stream:
    """One stream on its way through the windows.

    Attributes:
        windows: None holds it to its end.
        scored: takes what was decided of each window.
        said: what has left. The stream's tasks share one event loop; one of them at a time releases.
        calls: requests to the moderator, counted before each.
    """

    source: AsyncIterable[str | TextDelta]
    moderator: Moderator
    policy: Policy
    windows: Windows | None
    prompt: str | None
    thoughts: Thoughts | None
    model: str
    scope: RequestScope
    scored: list[WindowScore]
    behind: str = ""
    said: str = ""
    calls: int = 0
    began: float = field(default_factory=time.monotonic)
    _observer: AnswerObserver = NOBODY

    async def run(self, send: Send[str]) -> None:
        """Checked text to ``send``, to the end of the stream; see :func:`moderated`."""
        if isinstance(self.moderator, Ledger):
            await self._watched(send)
            return
        asked = Asked(
            model=self.model,
            moderator=self.moderator.name,
            method="none",
            sampling=None,
            stream=self.windows is not None,
            messages=() if self.prompt is None else (Message("user", self.prompt),),
            provider="unknown",
        )
        with observer().answering(asked) as self._observer:
            await self._watched(send)

    async def _watched(self, send: Send[str]) -> None:
        async def release(text: str) -> None:
            self.said += text
            await send(text)

        thoughts, thinking = self.thoughts, None
        if thoughts:
            stage = _in_force(thoughts.moderator, thoughts.policy)
            thinking = self._way("reasoning", thoughts.moderator, stage, thoughts.release)
        way = replace(self._way("output", self.moderator, self.policy, release), prefix=self.behind)
        watch = Watch(_deltas(self.source), way, thinking, windows=self.scored)
        await watch.run()
        told_of(watch.observed)
        self._observer.answered(self._answer(watch))
        if watch.ending == "unscored" and watch.error is not None:
            raise watch.error
        if watch.ending == "flagged" and watch.verdict is not None:
            thought = watch.flagged == "reasoning" and thinking is not None
            policy = thinking.policy if thought and thinking else self.policy
            raise _flagged(policy, watch.verdict, len(self.said), thought)

    def _way(
        self, stage: CheckStage, moderator: Moderator, policy: Policy, release: Callable[[str], Awaitable[None]]
    ) -> Way:
        """One channel's; without windows it is held to its end."""
        scorer = told(covering(moderator, StagePolicies.of(policy)), policy, scope=self.scope)
        cut = self.windows.over_all() if self.windows is not None and grows(scorer) else self.windows

        async def check(window: Check) -> Verdict:
            self.calls += 1
            # A ledger hears of the answer itself, and tells of it; of windows it knows what it is told here.
            asked = scorer.of_window(window.end) if isinstance(scorer, Ledger) else scorer
            with self._observer.checking(stage) as heard:
                verdict = await verdict_on(asked, window.text, window.decoded, prompt=self.prompt)
                heard.scored(verdict, policy, window.end)
            return verdict

        async def leave(text: str) -> bool:
            self._observer.released()
            await release(text)
            return True

        return Way(partial(HoldBack, cut), policy, check, leave)

    def _answer(self, watch: Watch) -> GuardedAnswer:
        """What telemetry is told of it; a block is an answer, whatever becomes of the exception that says so."""
        trace, reason = self._trace(watch), watch.finish_reason
        if trace.outcome == "blocked":
            return GuardedAnswer(self.said, "content_filter", trace, 0)
        return GuardedAnswer(self.said, "length" if reason == "length" else "stop", trace, 0)

    def _trace(self, watch: Watch) -> Trace:
        outcome, reason = _outcome(watch)
        score = score_of(self.policy.decide(watch.verdict), watch.verdict) if watch.verdict else None
        return trace_of_one(
            outcome,
            reason,
            score,
            method="none",
            moderator=self.moderator,
            model=self.model,
            tokens=len(watch.collected.token_ids),
            calls=self.calls,
            seconds=time.monotonic() - self.began,
            released=len(self.said),
            mode=self.policy.mode,
            observed=watch.observed,
            windows=self.scored,
            reasoning=self._reasoning(watch),
        )

    def _reasoning(self, watch: Watch) -> ReasoningTrace | None:
        if not watch.collected.reasoning:
            return None
        tokens, verdict = watch.collected.reasoning_tokens, watch.thought_verdict
        if self.thoughts is None:
            return ReasoningTrace("hide", tokens, checked=False)
        policy = _in_force(self.thoughts.moderator, self.thoughts.policy)
        return ReasoningTrace(
            "show", tokens, checked=True, score=score_of(policy.decide(verdict), verdict) if verdict else None
        )


def _in_force(moderator: Moderator, policy: Policy | None) -> Policy:
    return Policy.of(policy).with_default(moderator.default_threshold)


def _outcome(watch: Watch) -> tuple[Outcome, str]:
    """What became of a stream, and why."""
    error = no_verdict(watch.error)
    if watch.ending == "unscored":
        return "blocked", error
    if watch.ending == "flagged":
        return "blocked", "flagged: reasoning" if watch.flagged == "reasoning" else "flagged: text"
    return ("unchecked", f"{error}, passed by policy") if watch.unchecked else ("clean", "clean")


async def _deltas(source: AsyncIterable[str | TextDelta]) -> AsyncGenerator[TextDelta, None]:
    pieces = aiter(source)
    try:
        async for piece in pieces:
            yield TextDelta(piece) if isinstance(piece, str) else piece
    finally:
        held: list[Any] = [pieces] if pieces is source else [pieces, source]
        await close_all(one for one in held if hasattr(one, "aclose"))


def _flagged(policy: Policy, verdict: Verdict, released: int, thought: bool) -> FlaggedError:
    category, kind = policy.decide(verdict).category, "thought" if thought else "text"
    return FlaggedError(
        f"the {kind} was flagged for {category} (score {verdict.score:.2f}) after {released} characters; "
        "block it, replace it, or hand over to a model that repairs",
        category=category,
        score=verdict.score,
        released=released,
        thought=thought,
    )
