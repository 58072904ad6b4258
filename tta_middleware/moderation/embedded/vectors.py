"""Word vectors: a small network over the weighted mean of a text's words; numpy only.

The vectors come from the input embeddings of a language model, so a word that no labelled text held still says
something of those it resembles. The network's first layer is multiplied into them when the artifact is built: what
remains is a sum, a ramp and a weighted sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

MASS_STEPS = 255
PRIOR_MASS = 15.0
"""As many words of no meaning are added to every text, so that a text of three words is not judged by its three."""


@dataclass(frozen=True, slots=True, eq=False)
class WordVectors:
    """Quantised vectors and the network's second layer.

    Attributes:
        keys: (words,) sorted hashes of the known words.
        rows: (words, hidden) int8; a word's weight is already multiplied in.
        mass: (words,) uint8, a word's weight in steps of 1/255: frequent words weigh less.
        scale: (hidden,) float64 that turns sums into sums of activations.
        bias: (hidden,) float64.
        out: (hidden,) float64, then ``constant``: the second layer.
    """

    keys: NDArray[np.uint32]
    rows: NDArray[np.int8]
    mass: NDArray[np.uint8]
    scale: NDArray[np.float64]
    bias: NDArray[np.float64]
    out: NDArray[np.float64]
    constant: float

    def known(self, hashes: NDArray[np.uint64]) -> NDArray[np.intp]:
        """Distinct places of the known words among ``hashes``."""
        wanted = np.unique(hashes.astype(np.uint32))
        places = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return np.asarray(places[self.keys[places] == wanted])

    def logit(self, hashes: NDArray[np.uint64]) -> float:
        """What the network says of a text with these words; the sums are exact on every machine."""
        places = self.known(hashes)
        mass = int(self.mass[places].sum(dtype=np.int64)) / MASS_STEPS + PRIOR_MASS
        sums = self.rows[places].sum(axis=0, dtype=np.int64)
        hidden = np.maximum(sums * self.scale / mass + self.bias, 0.0)
        return math.fsum((hidden * self.out).tolist()) + self.constant
