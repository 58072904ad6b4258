"""Two moderators one after the other: a cheap one first, a judging model only where that one is not sure.

    moderator="cascade"          # local first, then the model that answers
    moderator="cascade:MODEL"    # local first, then another model of this process

Where the cheap one is sure depends on the threshold that a policy sets, so :meth:`Cascade.under` takes the policies.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources

from tta_middleware.aio.streams import close_all
from tta_middleware.moderation.adapters.plain import as_moderator
from tta_middleware.moderation.cascade_bounds import CascadeBounds, shipped_bounds
from tta_middleware.moderation.closing import Closing
from tta_middleware.moderation.embedded.moderator import ARTIFACT, UNSUPPORTED_LANGUAGE
from tta_middleware.policy import REPAIR_MARGIN, STAGES, Policy, StagePolicies
from tta_middleware.policy.coverage import grows, reads_rules
from tta_middleware.policy.verdicts import in_context, load, verdicts_on
from tta_middleware.protocols import Moderator
from tta_middleware.types import CATEGORIES, ModerationContext, Verdict

OVERALL, RULES = "unsafe", "rules"

_logger = logging.getLogger(__name__)


class Cascade(Closing):
    """A cheap moderator whose word counts where it is sure, and a judging one for all other texts.

    A text's verdict is that of whoever decided on it; the cheap one's gets ``unsafe`` besides, its highest score. So
    what is scored for every text are the categories that both score, and ``unsafe``. A text in a language that the
    cheap one does not read goes to the judging one. If either fails, the call fails.

    Args:
        first: the cheap one.
        second: the judging one; closing the cascade closes both.
        bounds: where the first is sure; by default those that are shipped. Bounds that were chosen for another first
            one count for nothing: every text goes to the second.
        first_fingerprint: of the first one, as ``bounds`` names it; by default the embedded moderator's.

    Attributes:
        origin: the cascade that this one was before it was told of policies or a request; None for one that was not.
    """

    max_characters: int | None = None
    categories: tuple[str, ...] | None = (*CATEGORIES, OVERALL, RULES)
    reads_rules = True
    grows = True

    def __init__(
        self,
        first: Moderator,
        second: Moderator,
        *,
        bounds: CascadeBounds | None = None,
        first_fingerprint: str | None = None,
        name: str = "cascade",
    ) -> None:
        first, second = as_moderator(first), as_moderator(second)
        self.name, self.default_threshold = name, second.default_threshold
        self.categories = _categories(first, second)
        self._first, self._second = first, second
        self.reads_rules, self.grows = reads_rules(second), grows(second)
        self.origin: Cascade | None = None
        self._always = False
        chosen = bounds or shipped_bounds()
        self._bounds = chosen if chosen.first == (first_fingerprint or embedded_fingerprint()) else None
        if self._bounds is None:
            _logger.warning(
                "moderator %r asks its second moderator about every text: its bounds were chosen for another %s; "
                "choose them anew with tta calibrate --only judging",
                name,
                first.name,
            )
        self._shadow: frozenset[str] = frozenset()
        thresholds = {self.default_threshold, REPAIR_MARGIN * self.default_threshold}
        self._low, self._high = self._sure(thresholds)

    def under(self, policies: StagePolicies) -> Cascade:
        """This cascade for those policies: sure only where it is so at every threshold that they enforce."""
        fitted = copy.copy(self)
        fitted.origin = self
        stages = [policies.at(stage).with_default(self.default_threshold) for stage in STAGES]
        fitted._low, fitted._high = self._sure({limit for policy in stages for limit in _limits(policy)})
        fitted._shadow = frozenset(name for policy in stages for name in policy.shadow)
        return fitted

    def in_context(self, context: ModerationContext) -> Cascade:
        """This cascade of both in that context.

        Rules are judged by the second alone, and bounds were chosen on answers: the second is asked about every text
        where there are rules, and about every prompt and every tool's result.
        """
        told = copy.copy(self)
        told._first, told._second = in_context(self._first, context), in_context(self._second, context)
        told._always, told.origin = bool(context.rules) or context.subject != "answer", self
        return told

    @property
    def undecided(self) -> tuple[float, float | None]:
        """The first one's scores from which on, and below which, the second is asked; None: up to the highest."""
        return self._low, self._high

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        """One verdict per text; its ``model`` says whose word it is.

        Raises:
            ModerationError: of either one. A text that the first is not sure of never passes on its word.
        """
        if not texts:
            return []
        said = await verdicts_on(self._first, texts, prompt=prompt)
        found = [_read(text, verdict) for text, verdict in zip(texts, said, strict=True)]
        asked = [index for index, (verdict, read) in enumerate(found) if not (read and self._is_sure(verdict))]
        second = await verdicts_on(self._second, [texts[index] for index in asked], prompt=prompt) if asked else []
        judged = dict(zip(asked, second, strict=True))
        return [
            judged[index] if index in judged else self._of_first(verdict) for index, (verdict, _) in enumerate(found)
        ]

    async def load(self) -> None:
        """Load both."""
        await load(self._first)
        await load(self._second)

    async def aclose(self) -> None:
        """Close both."""
        await close_all((self._first, self._second))

    def _sure(self, thresholds: set[float]) -> tuple[float, float | None]:
        return self._bounds.around(thresholds) if self._bounds is not None else (0.0, None)

    def _is_sure(self, verdict: Verdict) -> bool:
        """A category that some stage only reports makes nothing sure to be harmful."""
        if self._always:
            return False
        enforced = max((score for name, score in verdict.scores.items() if name not in self._shadow), default=0.0)
        return verdict.score < self._low or (self._high is not None and enforced >= self._high)

    def _of_first(self, verdict: Verdict) -> Verdict:
        scores = {OVERALL: verdict.score, **verdict.scores}
        return Verdict(scores, verdict.score >= self.default_threshold, verdict.model)


def _read(text: str, verdict: Verdict) -> tuple[Verdict, bool]:
    """A verdict without the mark of a language that its moderator does not read, and whether it read the text at all.

    A score of 0 for what is not blank is that of a text without a word that it knows.
    """
    scores: Mapping[str, float] = {name: s for name, s in verdict.scores.items() if name != UNSUPPORTED_LANGUAGE}
    if len(scores) == len(verdict.scores):
        return verdict, verdict.score > 0.0 or not text.strip()
    return Verdict(scores or {OVERALL: 0.0}, verdict.flagged, verdict.model), False


def _limits(policy: Policy) -> list[float]:
    """The scores from which on a policy flags, of whatever it enforces."""
    named = [limit for name, limit in policy.categories.items() if name not in policy.shadow]
    return [policy.margin * limit for limit in (policy.threshold or 0.0, *named)]


def _categories(first: Moderator, second: Moderator) -> tuple[str, ...] | None:
    """What is scored whoever decides; None if one of both does not say what it scores."""
    mine, others = (getattr(one, "categories", None) for one in (first, second))
    if mine is None or others is None:
        return None
    return tuple(name for name in dict.fromkeys((OVERALL, *mine, RULES)) if name in others)


@cache
def embedded_fingerprint() -> str:
    """16 hexadecimal digits for the weights of the embedded moderator."""
    weights = resources.files("tta_middleware.moderation.embedded") / ARTIFACT
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
