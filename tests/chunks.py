"""One text in pieces: whatever reads a stream must give the same for any."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise


def in_sizes(text: str, sizes: Sequence[int]) -> list[str]:
    """Pieces of these many characters, empty ones among them, and the rest."""
    places = [0, *accumulate(sizes)]
    return [*(text[start:end] for start, end in pairwise(places)), text[places[-1] :]]


def at_places(text: str, places: Sequence[int]) -> list[str]:
    """Pieces between these places, each taken modulo the length; none is empty."""
    cuts = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[start:end] for start, end in pairwise(cuts)]
