"""What is measured of answers beside the moderator's score."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tta_middleware.evaluation.judges import Opinion, Reviewer
from tta_middleware.guard.refusal_opening import is_refusal

_WORD = re.compile(r"\w+")


class Closeness(Protocol):
    """Measures how close texts are to a prompt, such as :class:`~tta_middleware.evaluation.relevance.Relevance`."""

    async def similarity(self, prompt: str, texts: Sequence[str]) -> list[float]:
        """Cosine of each text with ``prompt``, in order."""
        ...


@dataclass(frozen=True, slots=True)
class Measured:
    """What was found about one answer; None where it was not asked for. ``opinions`` are by the judge's name."""

    refusal: bool
    relevance: float | None = None
    opinions: Mapping[str, Opinion] = field(default_factory=dict)


async def opinions_on(texts: Sequence[str], prompt: str, judges: Mapping[str, Reviewer]) -> list[dict[str, Opinion]]:
    """What each judge says of each text, in order, by the judge's name.

    Raises:
        ModerationError: a judge could not score a text.
    """
    said = {name: await judge.review(texts, prompt) for name, judge in judges.items()}
    return [{name: opinions[at] for name, opinions in said.items()} for at in range(len(texts))]


async def measure(
    texts: Sequence[str],
    prompt: str,
    *,
    judges: Mapping[str, Reviewer] | None = None,
    relevance: Closeness | None = None,
) -> list[Measured]:
    """One per answer to ``prompt``, in order.

    Raises:
        ModerationError: a judge could not score a text.
    """
    opinions = await opinions_on(texts, prompt, judges or {})
    close: Sequence[float | None] = await relevance.similarity(prompt, texts) if relevance else [None] * len(texts)
    return [
        Measured(is_refusal(text), None if near is None else round(near, 4), said)
        for text, near, said in zip(texts, close, opinions, strict=True)
    ]


def distinct_n(texts: Iterable[str], n: int = 2) -> float | None:
    """Distinct over all runs of ``n`` words in the texts together (Li et al. 2016, arXiv 1510.03055); None without any.

    The share falls as text grows, so only collections of the same size compare.
    """
    runs = [run for text in texts for run in _runs(_WORD.findall(text.lower()), n)]
    return len(set(runs)) / len(runs) if runs else None


def _runs(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[at : at + n]) for at in range(len(words) - n + 1)]
