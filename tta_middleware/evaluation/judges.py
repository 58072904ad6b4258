"""A second opinion on answers that no search has seen.

A search that optimises against a moderator finds that moderator's blind spots, so a moderator cannot judge the answers
it has steered. A judge has no ``moderate`` and can therefore not be given to a guard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from tta_middleware.errors import ConfigurationError
from tta_middleware.policy import Policy
from tta_middleware.policy.verdicts import verdicts_on
from tta_middleware.protocols import Moderator
from tta_middleware.registry import (
    MODERATORS,
    CalibrationOf,
    find,
    judging_model,
    moderators_in,
    names,
    resolve_moderator,
)
from tta_middleware.types import Verdict

JUDGES = "tta_middleware.judges"
"""The entry-point group of judges: classes or functions that build a :class:`Judge` without arguments."""


class Judge(Protocol):
    """Scores finished answers, for reports only."""

    name: str

    def assess(self, texts: Sequence[str]) -> list[Verdict]:
        """One verdict per text, in order; ``flagged`` is the judge's decision."""
        ...


@dataclass(frozen=True, slots=True)
class Opinion:
    """What was said of one text."""

    score: float
    flagged: bool


class Reviewer(Protocol):
    """Gives second opinions on answers to one prompt."""

    async def review(self, texts: Sequence[str], prompt: str) -> list[Opinion]:
        """One opinion per text, in order.

        Raises:
            ModerationError: a text could not be scored.
        """
        ...

    async def aclose(self) -> None: ...


class JudgeReviewer:
    """A judge's opinions."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge

    async def review(self, texts: Sequence[str], prompt: str) -> list[Opinion]:
        return [Opinion(verdict.score, verdict.flagged) for verdict in self._judge.assess(texts)]

    async def aclose(self) -> None:
        """A judge holds nothing that needs closing."""


class ModeratorReviewer:
    """The opinions, at its own default threshold, of a moderator that the search does not use."""

    def __init__(self, moderator: Moderator) -> None:
        self._moderator = moderator
        self._policy = Policy().with_default(moderator.default_threshold)

    async def review(self, texts: Sequence[str], prompt: str) -> list[Opinion]:
        verdicts = await verdicts_on(self._moderator, texts, prompt=prompt)
        return [Opinion(verdict.score, self._policy.decide(verdict).reached) for verdict in verdicts]

    async def aclose(self) -> None:
        await self._moderator.aclose()


def resolve_judge(name: str, *, moderator: str, calibration: CalibrationOf | None = None) -> Reviewer:
    """A reviewer by name: one of the group :data:`JUDGES`, or a moderator that ``moderator`` does not ask.

    Args:
        calibration: what was measured of a judging model (``guard:MODEL``).

    Raises:
        ConfigurationError: the name is unknown, or it is among the moderators that the search sees.
    """
    if name in {moderator, *moderators_in(moderator)}:
        raise ConfigurationError(f"the judge must not be the moderator that the search sees ({name}); choose another")
    found = find(JUDGES, name)
    if found is not None:
        return JudgeReviewer(cast(Judge, found.load()()))
    if name in names(MODERATORS) or judging_model(name) is not None:
        return ModeratorReviewer(resolve_moderator(name, calibration=calibration))
    known = [*sorted({*names(JUDGES), *names(MODERATORS)} - {moderator}), "guard:MODEL"]
    raise ConfigurationError(f"unknown judge {name!r}; known are {', '.join(known) or 'none'}")
