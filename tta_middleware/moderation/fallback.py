"""A second moderator for when the first cannot answer."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Self

from tta_middleware.aio.streams import close_all
from tta_middleware.errors import ConfigurationError, InvalidVerdictError, ModerationError, ModerationUnavailableError
from tta_middleware.moderation.adapters.plain import as_moderator
from tta_middleware.moderation.wrapper import Wrapper
from tta_middleware.policy import StagePolicies
from tta_middleware.policy.coverage import fitted
from tta_middleware.policy.verdicts import in_context, load, verdicts_on
from tta_middleware.protocols import Moderator
from tta_middleware.types import ModerationContext, Verdict

_ALL_HARM = "unsafe"


class WithFallback(Wrapper):
    """Asks ``fallback`` when ``inner`` is unavailable or gives unusable answers.

    The verdicts' ``model`` says who gave them. An error that the user must mend, such as a wrong key, is raised:
    a fallback would hide it.

    Moderators differ in what a score means; with ``align`` (the default) the fallback's scores are mapped
    piecewise linearly so that its own default threshold falls on that of ``inner``, which policies are made for.

    Args:
        allow_fewer_categories: accept a fallback that leaves categories of ``inner`` unjudged while it answers. One
            that scores ``unsafe``, as guard models do, judges all harm in one; that score stands for each of them.

    Raises:
        ConfigurationError: the fallback scores less than ``inner``. One that does not declare its categories is found
            out, and this is raised, when it is asked.
    """

    def __init__(
        self, inner: Moderator, fallback: Moderator, *, align: bool = True, allow_fewer_categories: bool = False
    ) -> None:
        super().__init__(inner)
        self._fallback = fallback = as_moderator(fallback)
        self._allow_fewer = allow_fewer_categories
        self._check_covers(getattr(fallback, "categories", None))
        self._align = align
        # Rules that only one of the two reads would not be in force while the other answers.
        self.reads_rules = self.reads_rules and getattr(fallback, "reads_rules", False)

    def in_context(self, context: ModerationContext) -> Self:
        """As every wrapper, for both."""
        return self._around_both(in_context(self._inner, context), in_context(self._fallback, context))

    def under(self, policies: StagePolicies) -> Self:
        """As every wrapper, for both; a fallback on another scale is not told: the thresholds are not on its own."""
        same = self.default_threshold == self._fallback.default_threshold or not self._align
        return self._around_both(
            fitted(self._inner, policies), fitted(self._fallback, policies) if same else self._fallback
        )

    def _around_both(self, inner: Moderator, fallback: Moderator) -> Self:
        if inner is self._inner and fallback is self._fallback:
            return self
        twin = copy.copy(self)
        twin._inner, twin._fallback, twin.origin = inner, fallback, self
        return twin

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        """As ``inner``, or else as the fallback; if both fail, the fallback's error is raised."""
        try:
            return await verdicts_on(self._inner, texts, prompt=prompt)
        except (ModerationUnavailableError, InvalidVerdictError) as error:
            failure: ModerationError = error
        verdicts = await self._second(texts, prompt, failure)
        if not self._align:
            return verdicts
        here, there = self.default_threshold, self._fallback.default_threshold
        return [aligned(verdict, there, here) for verdict in verdicts]

    async def load(self) -> None:
        """Load both."""
        await super().load()
        await load(self._fallback)

    async def aclose(self) -> None:
        await close_all((self._inner, self._fallback))

    async def _second(self, texts: Sequence[str], prompt: str | None, failure: ModerationError) -> list[Verdict]:
        try:
            verdicts = await verdicts_on(self._fallback, texts, prompt=prompt)
        except ModerationError as error:
            error.add_note(f"the fallback was asked because: {failure}")
            raise
        declared: Collection[str] | None = getattr(self._fallback, "categories", None)
        if verdicts and declared is None:
            self._check_covers(verdicts[0].scores)
        return [self._in_full(verdict, verdict.scores if declared is None else declared) for verdict in verdicts]

    def _in_full(self, verdict: Verdict, scored: Collection[str]) -> Verdict:
        """A verdict with ``unsafe`` for each category that is judged in it: a threshold of its own stays in force."""
        if _ALL_HARM not in verdict.scores:
            return verdict
        missing = [name for name in self.categories or () if name not in scored]
        return replace(verdict, scores=dict.fromkeys(missing, verdict.scores[_ALL_HARM]) | dict(verdict.scores))

    def _check_covers(self, categories: Collection[str] | None) -> None:
        """``categories`` are those of the fallback; None is not known yet."""
        if self._allow_fewer or categories is None or _ALL_HARM in categories:
            return
        if missing := [name for name in self.categories or () if name not in categories]:
            raise ConfigurationError(
                f"the fallback {self._fallback.name!r} does not score {', '.join(missing)}, so nobody would judge that "
                f"while {self.name!r} is down; take one that does, or set allow_fewer_categories=True"
            )


def aligned(verdict: Verdict, threshold: float, onto: float) -> Verdict:
    """``verdict`` with scores mapped so that 0, ``threshold`` and 1 become 0, ``onto`` and 1."""
    if threshold == onto or not (0.0 < threshold < 1.0 and 0.0 < onto < 1.0):
        return verdict
    scores = {name: _map(score, threshold, onto) for name, score in verdict.scores.items()}
    return replace(verdict, scores=scores)


def _map(score: float, threshold: float, onto: float) -> float:
    if score < threshold:
        return score / threshold * onto
    return min(1.0, onto + (score - threshold) / (1.0 - threshold) * (1.0 - onto))
