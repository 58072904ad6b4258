"""What is measured of answers beside the moderator's score."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tta_middleware.evaluation.judges import Opinion, Reviewer
from tta_middleware.evaluation.refusal_opening import is_refusal

_WORD = re.compile(r"\w+")


class Closeness(Protocol):
    """Measures how close texts are to a prompt, such as :class:`~tta_middleware.evaluation.relevance.Relevance`."""

    async def similarity(self, prompt: str, texts: Sequence[str]) -> list[float]:
        """Cosine of each text with ``prompt``, in order."""
        ...


@dataclass(frozen=True, slots=True)
class Measured:
    """What was found about one answer; None where it was not asked for."""

    refusal: bool
    relevance: float | None = None
    opinion: Opinion | None = None


async def measure(
    texts: Sequence[str], prompt: str, *, judge: Reviewer | None = None, relevance: Closeness | None = None
) -> list[Measured]:
    """One per answer to ``prompt``, in order.

    Raises:
        ModerationError: the judge could not score a text.
    """
    opinions: Sequence[Opinion | None] = await judge.review(texts, prompt) if judge else [None] * len(texts)
    close: Sequence[float | None] = await relevance.similarity(prompt, texts) if relevance else [None] * len(texts)
    return [
        Measured(is_refusal(text), None if near is None else round(near, 4), opinion)
        for text, near, opinion in zip(texts, close, opinions, strict=True)
    ]


def distinct_n(texts: Iterable[str], n: int = 2) -> float | None:
    """Distinct over all runs of ``n`` words in the texts together (Li et al. 2016, arXiv 1510.03055); None without any.

    The share falls as text grows, so only collections of the same size compare.
    """
    runs = [run for text in texts for run in _runs(_WORD.findall(text.lower()), n)]
    return len(set(runs)) / len(runs) if runs else None


def _runs(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[at : at + n]) for at in range(len(words) - n + 1)]
