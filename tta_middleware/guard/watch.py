"""One stream under watch: decoded, cut into windows and scored, all at the same time.

A model may think before it answers. Thoughts are a channel of their own with a policy and a way out of their own; what
follows them leaves after they have passed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias, TypeVar

import anyio
from anyio.abc import TaskGroup

from tta_middleware.aio.streams import first_error, unless_cancelled_within
from tta_middleware.errors import EngineError, ModerationError
from tta_middleware.guard.holdback import Action, Check, End, Flagged, HoldBack, Release
from tta_middleware.policy import Decision, Policy
from tta_middleware.types import Channel, Collected, Completion, FinishReason, TextDelta, Verdict, WindowScore

Ending: TypeAlias = Literal["done", "flagged", "unscored", "stopped"]
"""``done``: all of it was checked and released. ``stopped``: whoever took the text wanted no more of it."""

_BROKEN_OFF: Final = "the answer was broken off from within before its end; ask again"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Way:
    """How the text of one channel is checked, and where it goes.

    Attributes:
        hold: makes the state machine that decides what is checked and released, for text that goes on from a prefix.
        policy: the policy that verdicts are held against.
        check: scores one window, as it was written and as it is decoded.
        release: takes checked text, in order; while it waits, so does the stream. False stops the stream.
        prefix: what had left of the channel before the stream began.
    """

    hold: Callable[[str], HoldBack]
    policy: Policy
    check: Callable[[Check], Awaitable[Verdict]]
    release: Callable[[str], Awaitable[bool]]
    prefix: str = ""


@dataclass(slots=True, eq=False)
class _Stretch:
    """Text of one channel, from where it begins to where another one does or the stream ends."""

    channel: Channel
    way: Way
    hold: HoldBack
    last: bool = False


@dataclass(slots=True, eq=False)
class _Asked:
    """A check that was sent off."""

    check: Check
    stretch: _Stretch
    answered: anyio.Event = field(default_factory=anyio.Event)
    verdict: Verdict | None = None
    error: ModerationError | None = None


@dataclass(slots=True, eq=False)
class Watch:
    """Drives a :class:`~tta_middleware.guard.holdback.HoldBack` with a real stream and a real moderator.

    Args:
        source: the stream; closed at the end, whatever ends it.
        answer: the way of the answer's text.
        reasoning: the way of thoughts; without one they are dropped, and nobody checks them.

    Attributes:
        collected: all that was decoded, which may hold what is flagged.
        verdict: the newest verdict in the order of the text; ``thought_verdict`` the newest on thoughts.
        ending: how it ended; None while it goes on, and for good if it was cancelled.
        flagged: the channel in which something was flagged.
        error: why a text has no verdict, with the ending ``unscored``.
        unchecked: something was released without a verdict, because the policy says ``on_error="open"``.
        observed: stages and categories for which a window would have been flagged, had the policy done more.
        windows: what was decided of each window, in the order of the text.
    """

    source: AsyncGenerator[TextDelta, None]
    answer: Way
    reasoning: Way | None = None
    # Shared by the tasks of ``run``, all on one event loop, so that only an ``await`` hands over between them:
    # - collected: written by _decode alone. Others read it at any time and see the answer's beginning, or all of it
    #   once its finish_reason is set.
    # - _here: the stretch that is being decoded; written by _decode alone, read by nobody else.
    # - verdict, thought_verdict, error, unchecked, windows, observed: written by _apply alone (through _apply_verdict),
    #   in the order of the text.
    # - a stretch's hold: fed by _decode and given verdicts by _apply; each call is synchronous, and its actions are
    #   carried out by the caller. Only one of the two releases: _decode does so only while no check is open, when
    #   _apply waits. Checks of all stretches stand in one queue, so that none is released before those in front of it.
    # - _asked: _decode and _apply append (both through _act), _apply alone removes, and only what it has settled.
    # - an _Asked: its own _score task writes it once, before it sets ``answered``; _apply reads it after that.
    # - ending, flagged: the first that is set stays, and cancels the group.
    # Whoever waits takes the _news event as it is now; _wake sets that one and puts a fresh one in its place.
    collected: Collected = field(default_factory=Collected)
    verdict: Verdict | None = None
    thought_verdict: Verdict | None = None
    ending: Ending | None = None
    flagged: Channel | None = None
    error: ModerationError | None = None
    unchecked: bool = False
    windows: list[WindowScore] = field(default_factory=list)
    _here: _Stretch | None = None
    observed: dict[str, None] = field(default_factory=dict)
    _asked: deque[_Asked] = field(default_factory=deque)
    _news: anyio.Event = field(default_factory=anyio.Event)
    _group: TaskGroup | None = None

    @property
    def completion(self) -> Completion:
        """What was decoded so far."""
        return self.collected.completion

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the stream ended; None while it goes on."""
        return self.collected.finish_reason

    async def run(self) -> None:
        """Until the stream has ended one way or the other; see ``ending``.

        Raises:
            Exception: what the source, a check or ``release`` raised, moderation errors apart.
            EngineError: the source, a check or ``release`` ended as if it were cancelled, and nobody had cancelled it.
        """
        try:
            async with anyio.create_task_group() as group:
                self._group = group
                group.start_soon(self._apply)
                await self._decode()
        except BaseExceptionGroup as errors:
            raise first_error(errors) from None
        if self.ending is None:
            # A group takes a task of its own that raises a cancellation for one that it has cancelled itself.
            raise EngineError(_BROKEN_OFF)

    async def _decode(self) -> None:
        async with aclosing(self.source) as deltas:
            while (delta := await of_part(anext(deltas, None))) is not None:
                stretch = await self._stretch_of(delta)
                self.collected.add(delta)
                if stretch is None:
                    continue
                await self._act(stretch, stretch.hold.feed(delta.text))
                # Only while a check is open: its verdict is what makes room, and what wakes this task.
                while self._asked and stretch.hold.full:
                    await self._news.wait()
        if self._here is None and self.collected.thoughts_only:
            self._end("done")  # thoughts that nobody checks, and nothing else
            return
        last = self._here or self._begin("answer", self.answer)
        last.last = True
        await self._finish(last)

    async def _stretch_of(self, delta: TextDelta) -> _Stretch | None:
        """Where a piece belongs; None for what is neither checked nor released."""
        way = self.answer if delta.channel == "answer" else self.reasoning
        if not delta.text or way is None:
            return None
        if self._here is not None and self._here.channel == delta.channel:
            return self._here
        if self._here is not None:
            await self._finish(self._here)
        return self._begin(delta.channel, way)

    def _begin(self, channel: Channel, way: Way) -> _Stretch:
        before = self.collected.text if channel == "answer" else self.collected.reasoning
        self._here = _Stretch(channel, way, way.hold(way.prefix + before))
        return self._here

    async def _finish(self, stretch: _Stretch) -> None:
        """No more text comes to a stretch: all of it is checked, and what is held leaves."""
        last = stretch.hold.finish()
        while self._asked and not any(isinstance(action, Check) for action in last):
            await self._news.wait()  # what was released before may still be on its way
        await self._act(stretch, last)

    async def _act(self, stretch: _Stretch, actions: Sequence[Action]) -> None:
        # Checks go out before anything is awaited: while a release waits for its consumer, decoding sends off others.
        for action in actions:
            if isinstance(action, Check):
                self._send_off(_Asked(action, stretch))
        for action in actions:
            match action:
                case Release(text):
                    if not await stretch.way.release(text):
                        self._end("stopped")
                        return
                case Flagged():
                    self.flagged = self.flagged or stretch.channel
                    self._end("flagged")
                case End():
                    if stretch.last:
                        self._end("done")

    def _send_off(self, asked: _Asked) -> None:
        self._asked.append(asked)
        if self._group is not None:
            self._group.start_soon(self._score, asked)
        self._wake()

    async def _score(self, asked: _Asked) -> None:
        try:
            asked.verdict = await asked.stretch.way.check(asked.check)
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
        stretch, end = asked.stretch, asked.check.end
        if asked.verdict is None:
            self.error = asked.error
            if asked.error is None or not stretch.way.policy.lets_pass(asked.error):
                self._note(asked)
                self._end("unscored")
                return
            self.unchecked = True
            actions = stretch.hold.verdict(end, safe=True)
            self._note(asked)
            await self._act(stretch, actions)
            return
        self.verdict = asked.verdict
        if stretch.channel == "reasoning":
            self.thought_verdict = asked.verdict
        decision = stretch.way.policy.decide(asked.verdict)
        if decision.observed:
            self.observed[f"{'output' if stretch.channel == 'answer' else stretch.channel}: {decision.category}"] = None
        actions = stretch.hold.verdict(end, safe=not decision.flagged, doubtful=decision.doubtful)
        self._note(asked, decision)
        await self._act(stretch, actions)

    def _note(self, asked: _Asked, decision: Decision | None = None) -> None:
        """What a check found; without a decision there was no verdict."""
        stretch = asked.stretch
        category = decision.category if decision else ""
        score = asked.verdict.scores.get(category, asked.verdict.score) if asked.verdict else None
        flagged = decision is not None and decision.flagged
        limit, released = stretch.way.policy.limit(category), len(stretch.hold.released)
        about = WindowScore(asked.check.end, score, category, limit, flagged, released, channel=stretch.channel)
        self.windows.append(about)

    def _wake(self) -> None:
        self._news.set()
        self._news = anyio.Event()

    def _end(self, ending: Ending) -> None:
        if self.ending is None:
            self.ending = ending
        # The task that is here is cancelled, too, and leaves at its next await; nothing follows what ends an answer.
        if self._group is not None:
            self._group.cancel_scope.cancel()


async def of_part(work: Awaitable[T]) -> T:
    """What an engine, or whatever else somebody has given, comes to.

    Raises:
        EngineError: it ended as if it were cancelled, and nobody had cancelled whoever asks.
    """
    return await unless_cancelled_within(work, EngineError(_BROKEN_OFF))


async def kept(_: str) -> bool:
    """Takes what is given out as a whole in the end."""
    return True
