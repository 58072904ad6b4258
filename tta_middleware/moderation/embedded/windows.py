"""Long texts: the whole and its windows.

A harmful passage must not drown in harmless text around it, so a long text's logit is the larger of the whole
text's and, less a margin, that of its most suspicious window. Windows start at fixed words: as an answer grows, a
window that has been passed keeps its say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

WIDTH = 96
STRIDE = 48
MARGIN = 0.75


def windowed_logits(
    logits: Callable[[Sequence[str]], NDArray[np.float64]], tokens: Sequence[str]
) -> NDArray[np.float64]:
    """(heads,) logits of a text's words, by a model that gives those of any run of words."""
    whole = logits(tokens)
    return combine(whole, [logits(tokens[start : start + WIDTH]) for start in window_starts(len(tokens))])


def window_starts(count: int) -> list[int]:
    """First words of the windows of a text with ``count`` words; the last window ends with the text."""
    if count <= WIDTH:
        return []
    return [*range(0, count - WIDTH, STRIDE), count - WIDTH]


def combine(whole: NDArray[np.float64], windows: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """(heads,) the larger of the whole text's logits and the windows' less the margin."""
    return np.maximum(whole, np.max(windows, axis=0) - MARGIN) if windows else whole
