"""What all wrappers around a moderator have in common."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Self

from tta_middleware.moderation.adapters.plain import as_moderator
from tta_middleware.moderation.closing import Closing
from tta_middleware.policy import StagePolicies
from tta_middleware.policy.coverage import fitted
from tta_middleware.policy.verdicts import in_context, load, verdicts_on
from tta_middleware.protocols import Moderator
from tta_middleware.types import ModerationContext, Verdict


class Wrapper(Closing):
    """Stands in for another moderator under its name, threshold, limits and categories; closing it closes that one.

    What an object with a ``moderate`` of texts lacks is filled in, as wherever a moderator is given.

    Attributes:
        origin: the wrapper that this one was before it was told of a context or of policies; None for one that was not.
    """

    def __init__(self, inner: Moderator) -> None:
        inner = as_moderator(inner)
        self._inner = inner
        self.name = inner.name
        self.default_threshold = inner.default_threshold
        self.max_characters: int | None = getattr(inner, "max_characters", None)
        self.overlap: int | None = getattr(inner, "overlap", None)
        self.categories: tuple[str, ...] | None = getattr(inner, "categories", None)
        self.reads_rules: bool = getattr(inner, "reads_rules", False)
        self.grows: bool = getattr(inner, "grows", False)
        self.origin: Moderator | None = None

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        """The inner moderator's verdicts."""
        return await verdicts_on(self._inner, texts, prompt=prompt)

    async def load(self) -> None:
        """Load the inner moderator."""
        await load(self._inner)

    def in_context(self, context: ModerationContext) -> Self:
        """The same around the inner moderator in that context; itself where that does not want to know."""
        return self._around(in_context(self._inner, context))

    def under(self, policies: StagePolicies) -> Self:
        """The same around the inner moderator under those policies; itself where that does not depend on them."""
        return self._around(fitted(self._inner, policies))

    def _around(self, inner: Moderator) -> Self:
        if inner is self._inner:
            return self
        twin = copy.copy(self)
        twin._inner, twin.origin = inner, self
        return twin

    async def aclose(self) -> None:
        await self._inner.aclose()
