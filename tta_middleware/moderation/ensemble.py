"""Several moderators as one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal, Self, TypeAlias

from tta_middleware.aio.streams import close_all
from tta_middleware.errors import ConfigurationError
from tta_middleware.moderation.adapters.plain import as_moderator
from tta_middleware.moderation.closing import Closing
from tta_middleware.moderation.concurrency import gather
from tta_middleware.moderation.fallback import aligned
from tta_middleware.policy import StagePolicies
from tta_middleware.policy.coverage import fitted, grows, reads_rules
from tta_middleware.policy.verdicts import in_context, load, verdicts_on
from tta_middleware.protocols import Moderator
from tta_middleware.types import ModerationContext, Verdict

Combine: TypeAlias = Literal["max", "mean", "weighted", "first-decisive"]

_THRESHOLD = 0.5


class Ensemble(Closing):
    """Combines moderators' scores category by category.

    Every member's scores are first mapped so that its own default threshold falls on 0.5, the ensemble's. A
    category counts over the members that score it. If a member fails, the ensemble fails: a missing voice is
    never taken for a pass.

    Args:
        combine: ``max`` (any member can flag), ``mean``, ``weighted`` (by ``weights``), or ``first-decisive``:
            members are asked one after the other, each only for texts whose largest score so far lies strictly
            inside ``undecided``; the last one's word stands.
        weights: one per member, not negative, not all 0; for ``weighted`` only.
        undecided: (low, high) around 0.5; for ``first-decisive`` only.

    Raises:
        ConfigurationError: no members, or weights or bounds that do not fit.
    """

    default_threshold = _THRESHOLD

    def __init__(
        self,
        moderators: Sequence[Moderator],
        combine: Combine = "max",
        *,
        weights: Sequence[float] | None = None,
        undecided: tuple[float, float] = (0.2, 0.8),
    ) -> None:
        if not moderators:
            raise ConfigurationError("an ensemble needs at least one moderator")
        if not 0.0 <= undecided[0] <= _THRESHOLD <= undecided[1] <= 1.0:
            raise ConfigurationError(f"undecided must be (low, high) around {_THRESHOLD}, not {undecided}")
        self._members = tuple(map(as_moderator, moderators))
        self._weights = _weights(len(self._members), combine, weights)
        self._combine = combine
        self._undecided = undecided
        # What nobody counts is not scored: a threshold for it would enforce nothing.
        counted = [member for member, weight in zip(self._members, self._weights, strict=True) if weight > 0.0]
        self.categories = _categories(counted, combine)
        self.name = f"{combine}({', '.join(member.name for member in self._members)})"
        # Whoever reads rules can flag for them by himself only where any member's score counts.
        self.reads_rules = combine == "max" and any(map(reads_rules, self._members))
        self.grows = any(map(grows, self._members))
        self.origin: Moderator | None = None

    def in_context(self, context: ModerationContext) -> Self:
        """The same of its members in that context; itself where none wants to know."""
        return self._around([in_context(member, context) for member in self._members])

    def under(self, policies: StagePolicies) -> Self:
        """The same of its members under those policies; members on another scale are not told."""
        return self._around(
            [fitted(one, policies) if one.default_threshold == _THRESHOLD else one for one in self._members]
        )

    def _around(self, members: Sequence[Moderator]) -> Self:
        if all(one is other for one, other in zip(members, self._members, strict=True)):
            return self
        twin = copy.copy(self)
        twin._members, twin.origin = tuple(members), self
        return twin

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        """One combined verdict per text; members are asked side by side, except for ``first-decisive``."""
        if not texts:
            return []
        if self._combine == "first-decisive":
            return await self._one_by_one(texts, prompt)
        answers = await gather([partial(self._ask, member, texts, prompt) for member in self._members])
        return [self._combined(column) for column in zip(*answers, strict=True)]

    async def load(self) -> None:
        """Load every member."""
        for member in self._members:
            await load(member)

    async def aclose(self) -> None:
        await close_all(self._members)

    async def _ask(self, member: Moderator, texts: Sequence[str], prompt: str | None) -> list[Verdict]:
        verdicts = await verdicts_on(member, texts, prompt=prompt)
        return [aligned(verdict, member.default_threshold, _THRESHOLD) for verdict in verdicts]

    async def _one_by_one(self, texts: Sequence[str], prompt: str | None) -> list[Verdict]:
        verdicts: dict[int, Verdict] = {}
        open_ = list(range(len(texts)))
        low, high = self._undecided
        for member in self._members:
            answers = await self._ask(member, [texts[index] for index in open_], prompt)
            verdicts |= dict(zip(open_, answers, strict=True))
            open_ = [index for index in open_ if low < verdicts[index].score < high]
            if not open_:
                break
        return [verdicts[index] for index in range(len(texts))]

    def _combined(self, verdicts: Sequence[Verdict]) -> Verdict:
        merge = max_scores if self._combine == "max" else partial(mean_scores, weights=self._weights)
        scores = merge([verdict.scores for verdict in verdicts])
        flagged = max(scores.values()) >= _THRESHOLD
        return Verdict(scores=scores, flagged=flagged, model=self.name)


Merge: TypeAlias = Callable[[Sequence[Mapping[str, float]]], dict[str, float]]


def max_scores(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The largest score of each category."""
    names = {name: None for member in scores for name in member}
    return {name: max(member[name] for member in scores if name in member) for name in names}


def mean_scores(scores: Sequence[Mapping[str, float]], *, weights: Sequence[float]) -> dict[str, float]:
    """The weighted mean of each category over the members that score it; a weight of 0 leaves a member out."""
    totals: dict[str, float] = {}
    masses: dict[str, float] = {}
    for member, weight in zip(scores, weights, strict=True):
        for name, score in member.items():
            totals[name] = totals.get(name, 0.0) + weight * score
            masses[name] = masses.get(name, 0.0) + weight
    return {name: min(1.0, totals[name] / mass) for name, mass in masses.items() if mass > 0.0}


def _categories(members: Sequence[Moderator], combine: Combine) -> tuple[str, ...] | None:
    """What is scored for every text: all that some member scores, or, where one may decide alone, what each does."""
    declared: list[tuple[str, ...] | None] = [getattr(member, "categories", None) for member in members]
    known = [names for names in declared if names is not None]
    if len(known) < len(declared):
        return None
    names = dict.fromkeys(name for names in known for name in names)
    return tuple(name for name in names if combine != "first-decisive" or all(name in one for one in known))


def _weights(members: int, combine: Combine, weights: Sequence[float] | None) -> tuple[float, ...]:
    if combine != "weighted":
        if weights is not None:
            raise ConfigurationError(f"weights are for combine='weighted', not {combine!r}")
        return (1.0,) * members
    if weights is None or len(weights) != members or not all(weight >= 0.0 for weight in weights):
        raise ConfigurationError(f"combine='weighted' needs {members} weights of 0 or more, one per moderator")
    if not 0.0 < sum(weights) < float("inf"):
        raise ConfigurationError("the weights must have a finite sum above 0")
    return tuple(weights)
