"""The same windows over a stream of any other model: checked text out, nothing repaired."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable
from contextlib import aclosing, closing
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


async def moderated(
    source: AsyncIterable[str],
    moderator: Moderator,
    policy: Policy | None = None,
    *,
    windows: Windows | None = None,
    hold: bool = False,
    prompt: str | None = None,
    scored: list[WindowScore] | None = None,
) -> AsyncGenerator[str, None]:
    """Yield the text of ``source`` as it is checked; with ``hold``, all of it once it was checked to its end.

    The moderator works while ``source`` goes on; its last check sees the whole text, before that windows with
    ``windows.context`` characters before them. Under a policy that only observes all of it is yielded, and a warning in
    the log names what would have been withheld. Closing the generator closes ``source`` if that can be closed.
    ``scored`` takes what was decided of each window, as it comes.

    Raises:
        FlaggedError: a window was flagged. What was yielded before it was checked and stays.
        ConfigurationError: the policy has a threshold for a category that the moderator does not score.
        ModerationError: a window has no verdict and the policy is ``on_error="closed"``.
        Exception: what ``source`` raises.
    """
    in_force = (policy or Policy()).with_default(moderator.default_threshold)
    scope = RequestScope()
    scorer = told(covering(moderator, StagePolicies.of(in_force)), in_force, scope=scope)
    cut = (windows or Windows()).over_all() if grows(scorer) else windows or Windows()

    async def check(window: Check) -> Verdict:
        return await verdict_on(scorer, window.text, window.decoded, prompt=prompt)

    async def produce(send: Send[str]) -> None:
        released = 0

        async def release(text: str) -> bool:
            nonlocal released
            released += len(text)
            await send(text)
            return True

        way = Way(partial(HoldBack, None if hold else cut), in_force, check, release)
        watch = Watch(_deltas(source), way, windows=[] if scored is None else scored)
        await watch.run()
        told_of(watch.observed)
        if watch.ending == "unscored" and watch.error is not None:
            raise watch.error
        if watch.ending == "flagged" and watch.verdict is not None:
            raise _flagged(in_force.decide(watch.verdict).category, watch.verdict.score, released)

    with closing(scope):
        async with aclosing(owned(produce)) as pieces:
            async for piece in pieces:
                yield piece


async def _deltas(source: AsyncIterable[str]) -> AsyncGenerator[TextDelta, None]:
    try:
        async for text in source:
            yield TextDelta(text)
    finally:
        if isinstance(source, AsyncGenerator):
            await source.aclose()


def _flagged(category: str, score: float, released: int) -> FlaggedError:
    return FlaggedError(
        f"the text was flagged for {category} (score {score:.2f}) after {released} characters; "
        "block it, replace it, or hand over to a model that repairs",
        category=category,
        score=score,
        released=released,
    )
