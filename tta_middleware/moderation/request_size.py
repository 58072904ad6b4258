"""How many texts go into one request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeAlias

from pydantic import PositiveInt

from tta_middleware.config import Settings
from tta_middleware.errors import ConfigurationError
from tta_middleware.policy.verdicts import counted
from tta_middleware.types import Verdict

Score: TypeAlias = Callable[[list[str]], Awaitable[list[Verdict]]]


class BatchLimits(Settings):
    """Bounds of one request; a single text may be longer than ``max_characters`` and then goes alone.

    Attributes:
        max_texts: texts in one request.
        max_characters: characters of all texts of one request together.
    """

    max_texts: PositiveInt = 64
    max_characters: PositiveInt = 100_000

    def allows(self, texts: int, characters: int) -> bool:
        """Whether a request of this size stays within the bounds."""
        return texts <= self.max_texts and characters <= self.max_characters


def checked_limit(characters: int | None) -> int | None:
    """The longest text of a moderator, as a user gave it.

    Raises:
        ConfigurationError: it is below 1.
    """
    if characters is not None and characters < 1:
        raise ConfigurationError(f"max_characters must be at least 1, or None for any length, not {characters}")
    return characters


def split(texts: Sequence[str], limits: BatchLimits) -> list[list[str]]:
    """Consecutive groups of ``texts`` within ``limits``, as few as a greedy walk gives."""
    groups: list[list[str]] = []
    characters = 0
    for text in texts:
        if groups and limits.allows(len(groups[-1]) + 1, characters + len(text)):
            groups[-1].append(text)
            characters += len(text)
        else:
            groups.append([text])
            characters = len(text)
    return groups


async def without_blanks(texts: Sequence[str], categories: Iterable[str], model: str, score: Score) -> list[Verdict]:
    """``score`` for the texts that hold more than white space, and 0 in each category for the others.

    The APIs refuse empty texts, and one empty candidate would spoil a whole list. There is nothing in it to flag.
    """
    spoken = [text for text in texts if text.strip()]
    verdicts = iter(counted(await score(spoken), spoken, model) if spoken else [])
    nothing = Verdict(scores=dict.fromkeys(categories, 0.0), flagged=False, model=model)
    return [next(verdicts) if text.strip() else nothing for text in texts]
