"""A limit on the length of a text for a moderator that declares none of its own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from tta_middleware.errors import ConfigurationError
from tta_middleware.moderation.request_size import checked_limit
from tta_middleware.moderation.wrapper import Wrapper
from tta_middleware.policy.verdicts import in_parts, verdicts_on
from tta_middleware.protocols import Moderator
from tta_middleware.types import Verdict


class InParts(Wrapper):
    """A moderator that is given at most ``max_characters`` of a text at once.

    A longer text goes as parts that overlap, in one list; each category's largest score over the parts counts.

    Args:
        overlap: characters that two parts share; a phrase up to this length lies whole within one of them. None takes
            :data:`tta_middleware.policy.verdicts.OVERLAP` or a quarter of ``max_characters``, the smaller.

    Raises:
        ConfigurationError: a length is below 1, or the overlap is more than half a part.
    """

    def __init__(self, inner: Moderator, max_characters: int, *, overlap: int | None = None) -> None:
        super().__init__(inner)
        if overlap is not None and not 0 <= overlap <= max_characters // 2:
            raise ConfigurationError(f"overlap must lie between 0 and half of max_characters, not be {overlap}")
        self.max_characters = checked_limit(max_characters)
        self.overlap = overlap

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        ask = partial(verdicts_on, self._inner, prompt=prompt)
        return await in_parts(texts, ask, self.max_characters, self.overlap)
