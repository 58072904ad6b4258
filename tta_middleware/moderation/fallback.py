"""A second moderator for when the first cannot answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tta_middleware.errors import InvalidVerdictError, ModerationError, ModerationUnavailableError
from tta_middleware.moderation.wrapper import Wrapper
from tta_middleware.protocols import Moderator
from tta_middleware.types import Verdict
from tta_middleware.verdicts import verdicts_on


class WithFallback(Wrapper):
    """Asks ``fallback`` when ``inner`` is unavailable or gives unusable answers.

    The verdicts' ``model`` says who gave them. An error that the user must mend, such as a wrong key, is raised:
    a fallback would hide it.

    Moderators differ in what a score means; with ``align`` (the default) the fallback's scores are mapped
    piecewise linearly so that its own default threshold falls on that of ``inner``, which policies are made for.

    Attributes:
        fallbacks: calls that the fallback answered.
    """

    def __init__(self, inner: Moderator, fallback: Moderator, *, align: bool = True) -> None:
        super().__init__(inner)
        self._fallback = fallback
        self._align = align
        self.fallbacks = 0

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        """As ``inner``, or else as the fallback; if both fail, the fallback's error is raised."""
        try:
            return await verdicts_on(self._inner, texts, prompt=prompt)
        except (ModerationUnavailableError, InvalidVerdictError) as error:
            failure: ModerationError = error
        verdicts = await self._second(texts, prompt, failure)
        self.fallbacks += 1
        if not self._align:
            return verdicts
        here, there = self.default_threshold, self._fallback.default_threshold
        return [aligned(verdict, there, here) for verdict in verdicts]

    async def aclose(self) -> None:
        try:
            await self._inner.aclose()
        finally:
            await self._fallback.aclose()

    async def _second(self, texts: Sequence[str], prompt: str | None, failure: ModerationError) -> list[Verdict]:
        try:
            return await verdicts_on(self._fallback, texts, prompt=prompt)
        except ModerationError as error:
            error.add_note(f"the fallback was asked because: {failure}")
            raise


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
