"""One stream under watch: decoded, cut into windows and scored, all at the same time."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import anyio
from anyio.abc import TaskGroup

from tta_middleware.aio.streams import first_error
from tta_middleware.errors import ModerationError
from tta_middleware.guard.holdback import Action, Check, End, Flagged, HoldBack, Release
from tta_middleware.policy import Decision, Policy
from tta_middleware.types import Completion, FinishReason, TextDelta, Verdict, WindowScore

Ending: TypeAlias = Literal["done", "flagged", "unscored", "stopped"]
"""``done``: all of it was checked and released. ``stopped``: whoever took the text wanted no more of it."""


@dataclass(slots=True, eq=False)
class _Asked:
    """A check that was sent off."""

    check: Check
    answered: anyio.Event = field(default_factory=anyio.Event)
    verdict: Verdict | None = None
    error: ModerationError | None = None


@dataclass(slots=True, eq=False)
class Watch:
    """Drives a :class:`~tta_middleware.guard.holdback.HoldBack` with a real stream and a real moderator.

    Args:
        source: the stream; closed at the end, whatever ends it.
        hold: the state machine that decides what is checked and released.
        policy: the policy that verdicts are held against.
        check: scores one window, as it was written and as it is decoded.
        release: takes checked text, in order; while it waits, so does the stream. False stops the stream.

    Attributes:
        text: all text that was decoded, which may hold what is flagged.
        token_ids: the ids that were decoded for it.
        verdict: the newest verdict in the order of the text.
        ending: how it ended; None while it goes on, and for good if it was cancelled.
        error: why a text has no verdict, with the ending ``unscored``.
        unchecked: something was released without a verdict, because the policy says ``on_error="open"``.
        windows: what was decided of each window, in the order of the text.
    """

    source: AsyncGenerator[TextDelta, None]
    hold: HoldBack
    policy: Policy
    check: Callable[[Check], Awaitable[Verdict]]
    release: Callable[[str], Awaitable[bool]]
    # Shared by the tasks of ``run``, all on one event loop, so that only an ``await`` hands over between them:
    # - text, token_ids, finish_reason: written by _decode alone. Others read them at any time and see the answer's
    #   beginning, or all of it once finish_reason is set.
    # - verdict, error, unchecked, windows: written by _apply alone (through _apply_verdict), in the order of the text.
    # - hold: fed by _decode and given verdicts by _apply; each call is synchronous, and its actions are carried out by
    #   the caller. Only one of the two releases: _decode does so only while no check is open, when _apply waits.
    # - _asked: _decode and _apply append (both through _act), _apply alone removes, and only what it has settled.
    # - an _Asked: its own _score task writes it once, before it sets ``answered``; _apply reads it after that.
    # - ending: the first that is set stays, and cancels the group.
    # Whoever waits takes the _news event as it is now; _wake sets that one and puts a fresh one in its place.
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    verdict: Verdict | None = None
    ending: Ending | None = None
    error: ModerationError | None = None
    unchecked: bool = False
    windows: list[WindowScore] = field(default_factory=list)
    _asked: deque[_Asked] = field(default_factory=deque)
    _news: anyio.Event = field(default_factory=anyio.Event)
    _group: TaskGroup | None = None

    @property
    def completion(self) -> Completion:
        """What was decoded so far."""
        return Completion(self.text, tuple(self.token_ids), self.finish_reason or "aborted")

    async def run(self) -> None:
        """Until the stream has ended one way or the other; see ``ending``.

        Raises:
            Exception: what the source, a check or ``release`` raised, moderation errors apart.
        """
        try:
            async with anyio.create_task_group() as group:
                self._group = group
                group.start_soon(self._apply)
                await self._decode()
        except BaseExceptionGroup as errors:
            raise first_error(errors) from None

    async def _decode(self) -> None:
        async with aclosing(self.source) as deltas:
            async for delta in deltas:
                self.text += delta.text
                self.token_ids += delta.token_ids
                self.finish_reason = delta.finish_reason or self.finish_reason
                await self._act(self.hold.feed(delta.text))
                # Only while a check is open: its verdict is what makes room, and what wakes this task.
                while self._asked and self.hold.full:
                    await self._news.wait()
        last = self.hold.finish()
        while self._asked and not any(isinstance(action, Check) for action in last):
            await self._news.wait()  # what was released before may still be on its way
        await self._act(last)

    async def _act(self, actions: Sequence[Action]) -> None:
        # Checks go out before anything is awaited: while a release waits for its consumer, decoding sends off others.
        for action in actions:
            if isinstance(action, Check):
                self._send_off(_Asked(action))
        for action in actions:
            match action:
                case Release(text):
                    if not await self.release(text):
                        self._end("stopped")
                        return
                case Flagged():
                    self._end("flagged")
                case End():
                    self._end("done")

    def _send_off(self, asked: _Asked) -> None:
        self._asked.append(asked)
        if self._group is not None:
            self._group.start_soon(self._score, asked)
        self._wake()

    async def _score(self, asked: _Asked) -> None:
        try:
            asked.verdict = await self.check(asked.check)
        except ModerationError as error:
            # Kept for its turn: texts before this one may still be flagged, and then this error is of no account.
            asked.error = error
        asked.answered.set()

    async def _apply(self) -> None:
        """Verdicts are applied in the order of the text, in whatever order they come."""
        while self.ending is None:
            while not self._asked:
                await self._news.wait()
            asked = self._asked[0]
            await asked.answered.wait()
            # It stays in the queue while its text is being released, so that _decode does not release at the same time.
            await self._apply_verdict(asked)
            self._asked.popleft()
            self._wake()

    async def _apply_verdict(self, asked: _Asked) -> None:
        if asked.verdict is None:
            self.error = asked.error
            if asked.error is None or not self.policy.lets_pass(asked.error):
                self._note(asked)
                self._end("unscored")
                return
            self.unchecked = True
            actions = self.hold.verdict(asked.check.end, safe=True)
            self._note(asked)
            await self._act(actions)
            return
        self.verdict = asked.verdict
        decision = self.policy.decide(asked.verdict)
        end, safe = asked.check.end, not decision.flagged
        actions = self.hold.verdict(end, safe=safe, doubtful=decision.doubtful)
        self._note(asked, decision)
        await self._act(actions)

    def _note(self, asked: _Asked, decision: Decision | None = None) -> None:
        """What a check found; without a decision there was no verdict."""
        category = decision.category if decision else ""
        score = asked.verdict.scores.get(category, asked.verdict.score) if asked.verdict else None
        flagged = decision is not None and decision.flagged
        limit, released = self.policy.limit(category), len(self.hold.released)
        self.windows.append(WindowScore(asked.check.end, score, category, limit, flagged, released))

    def _wake(self) -> None:
        self._news.set()
        self._news = anyio.Event()

    def _end(self, ending: Ending) -> None:
        if self.ending is None:
            self.ending = ending
        # The task that is here is cancelled, too, and leaves at its next await; nothing follows what ends an answer.
        if self._group is not None:
            self._group.cancel_scope.cancel()
