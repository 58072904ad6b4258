"""A moderator without a model, for tests."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence

from tta_middleware.errors import ModerationError
from tta_middleware.moderation.closing import Closing
from tta_middleware.testing.fault_server import Scorer, marked_scores
from tta_middleware.types import CATEGORIES, Verdict


def flagging(*words: str) -> Scorer:
    """Scores of a text: 0.9 for illicit where it holds one of ``words``, in lower case, else 0.05; 0 for the rest."""

    def score(text: str) -> dict[str, float]:
        found = any(word in text.lower() for word in words)
        return dict.fromkeys(CATEGORIES, 0.0) | {"illicit": 0.9 if found else 0.05}

    return score


class ScriptedModerator(Closing):
    """Scores texts by a function; fails or waits on demand.

    Args:
        score: scores of a text, see :func:`flagging`; by default 0.9 for violence where it holds ``flagme``.
        failures: what the calls raise, in order; None lets a call succeed, and so do all after the last.
        gate: awaited in each call before it answers.

    Attributes:
        calls: the texts of each call, in order.
        prompts: the prompt of each call.
        in_flight: calls that have not ended.
        closed: how often it was closed.
    """

    def __init__(
        self,
        name: str = "scripted",
        *,
        default_threshold: float = 0.5,
        score: Scorer = marked_scores,
        failures: Iterable[ModerationError | None] = (),
        gate: Callable[[], Awaitable[object]] | None = None,
    ) -> None:
        self.name = name
        self.default_threshold = default_threshold
        self._score = score
        self._failures = iter(failures)
        self._gate = gate
        self.calls: list[list[str]] = []
        self.prompts: list[str | None] = []
        self.in_flight = 0
        self.closed = 0

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        self.calls.append(list(texts))
        self.prompts.append(prompt)
        failure = next(self._failures, None)
        self.in_flight += 1
        try:
            if self._gate is not None:
                await self._gate()
        finally:
            self.in_flight -= 1
        if failure is not None:
            raise failure
        return [self._verdict(text) for text in texts]

    async def aclose(self) -> None:
        self.closed += 1

    def _verdict(self, text: str) -> Verdict:
        scores = dict(self._score(text))
        return Verdict(scores=scores, flagged=max(scores.values()) >= self.default_threshold, model=self.name)
