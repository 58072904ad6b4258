"""The same windows over a stream of any other model: checked text out, nothing repaired."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable
from contextlib import aclosing, closing
from dataclasses import dataclass
from functools import partial

from tta_middleware.aio.streams import Send, owned
from tta_middleware.config import Windows
from tta_middleware.errors import FlaggedError
from tta_middleware.guard.holdback import Check, HoldBack
from tta_middleware.guard.ledger import told_of
from tta_middleware.guard.watch import Watch, Way
from tta_middleware.policy import Policy, StagePolicies
from tta_middleware.policy.coverage import covering, grows, told
from tta_middleware.policy.verdicts import verdict_on
from tta_middleware.protocols import Moderator
from tta_middleware.types import RequestScope, TextDelta, Verdict, WindowScore


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
) -> AsyncGenerator[str, None]:
    """Yield the text of ``source`` as it is checked; with ``hold``, all of it once it was checked to its end.

    The moderator works while ``source`` goes on; its last check sees the whole text, before that windows with
    ``windows.context`` characters before them. Under a policy that only observes all of it is yielded, and a warning in
    the log names what would have been withheld. Closing the generator closes ``source`` if that can be closed.
    ``scored`` takes what was decided of each window, as it comes.

    Pieces of ``source`` in the channel ``reasoning`` are no part of the text: they go to ``thoughts``, and without that
    nowhere. What follows a thought is yielded after all of that has passed.

    Raises:
        FlaggedError: a window was flagged. What was yielded before it was checked and stays.
        ConfigurationError: the policy has a threshold for a category that the moderator does not score.
        ModerationError: a window has no verdict and the policy is ``on_error="closed"``.
        Exception: what ``source`` raises.
    """
    in_force = _in_force(moderator, policy)
    scope = RequestScope()

    async def produce(send: Send[str]) -> None:
        released = 0

        async def release(text: str) -> None:
            nonlocal released
            released += len(text)
            await send(text)

        def way(scorer: Moderator, stage: Policy, leave: Callable[[str], Awaitable[None]]) -> Way:
            return _way(scorer, stage, leave, None if hold else windows or Windows(), prompt, scope)

        thinking = None
        if thoughts:
            thinking = way(thoughts.moderator, _in_force(thoughts.moderator, thoughts.policy), thoughts.release)
        watch = Watch(
            _deltas(source), way(moderator, in_force, release), thinking, windows=[] if scored is None else scored
        )
        await watch.run()
        told_of(watch.observed)
        if watch.ending == "unscored" and watch.error is not None:
            raise watch.error
        if watch.ending == "flagged" and watch.verdict is not None:
            thought = watch.flagged == "reasoning" and thinking is not None
            raise _flagged(thinking.policy if thought and thinking else in_force, watch.verdict, released, thought)

    with closing(scope):
        async with aclosing(owned(produce)) as pieces:
            async for piece in pieces:
                yield piece


def _in_force(moderator: Moderator, policy: Policy | None) -> Policy:
    return (policy or Policy()).with_default(moderator.default_threshold)


def _way(
    moderator: Moderator,
    policy: Policy,
    release: Callable[[str], Awaitable[None]],
    windows: Windows | None,
    prompt: str | None,
    scope: RequestScope,
) -> Way:
    """One channel's; without windows it is held to its end."""
    scorer = told(covering(moderator, StagePolicies.of(policy)), policy, scope=scope)
    cut = windows.over_all() if windows is not None and grows(scorer) else windows

    async def check(window: Check) -> Verdict:
        return await verdict_on(scorer, window.text, window.decoded, prompt=prompt)

    async def leave(text: str) -> bool:
        await release(text)
        return True

    return Way(partial(HoldBack, cut), policy, check, leave)


async def _deltas(source: AsyncIterable[str | TextDelta]) -> AsyncGenerator[TextDelta, None]:
    try:
        async for piece in source:
            yield TextDelta(piece) if isinstance(piece, str) else piece
    finally:
        if isinstance(source, AsyncGenerator):
            await source.aclose()


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
