"""Hashed n-gram features: word 1-2-grams and character 3-5-grams, present or absent.

Presence instead of counts makes a loop worth exactly one of its turns, so "1. 1. 1." is neither safe nor harmful
for its length. Hashing needs no vocabulary (Weinberger et al. 2009, "Feature hashing"): a feature is an index
below the table's size, and a model is a table of weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

WORD_BITS = 18
CHAR_BITS = 17
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ORDERS = (3, 4, 5)


@lru_cache(maxsize=65_536)
def _hash(word: str) -> int:
    return crc32(word.encode("utf-8", "surrogatepass"))


def hash_words(tokens: Sequence[str]) -> NDArray[np.uint64]:
    """(n,) one stable hash a word."""
    return np.fromiter(map(_hash, tokens), dtype=np.uint64, count=len(tokens))


def word_grams(hashes: NDArray[np.uint64]) -> NDArray[np.intp]:
    """Sorted distinct indices below ``2**WORD_BITS`` of the words and of neighbouring pairs."""
    pairs = hashes[:-1] * np.uint64(0x100000001B3) + hashes[1:] + np.uint64(1)
    return np.unique(_bucket(np.concatenate((hashes, pairs)), WORD_BITS))


def char_grams(tokens: Sequence[str]) -> NDArray[np.intp]:
    """Sorted distinct indices below ``2**CHAR_BITS`` of the 3- to 5-byte strings inside padded words."""
    line = f" {' '.join(tokens)} ".encode("utf-8", "surrogatepass")
    data = np.frombuffer(line, dtype=np.uint8).astype(np.uint64)
    inner_space = np.concatenate(((0,), np.cumsum(data == 32)))
    grams = [_grams_of_order(data, inner_space, order) for order in _ORDERS if len(data) >= order]
    return np.unique(_bucket(np.concatenate(grams), CHAR_BITS)) if grams else np.empty(0, dtype=np.intp)


def _grams_of_order(data: NDArray[np.uint64], inner_space: NDArray[np.int64], order: int) -> NDArray[np.uint64]:
    count = len(data) - order + 1
    rolled = np.full(count, order, dtype=np.uint64)
    for offset in range(order):
        rolled = rolled * np.uint64(257) + data[offset : offset + count]
    # A space may open or close a gram, never stand inside it: grams do not cross words.
    spaces = inner_space[order - 1 : order - 1 + count] - inner_space[1 : count + 1]
    return np.asarray(rolled[spaces == 0])


def skip_pairs(hashes: NDArray[np.uint64], bits: int) -> NDArray[np.intp]:
    """Sorted distinct indices below ``2**bits`` of the pairs with one word between them."""
    return np.unique(_bucket(hashes[:-2] * np.uint64(0x1000193) + hashes[2:] + np.uint64(2), bits))


def hashed_runs(data: NDArray[np.uint8], order: int, bits: int) -> NDArray[np.intp]:
    """(n,) indices below ``2**bits`` of all runs of ``order`` bytes, with repetitions."""
    count = max(0, len(data) - order + 1)
    rolled = np.full(count, order, dtype=np.uint64)
    for offset in range(order):
        rolled = rolled * np.uint64(257) + data[offset : offset + count]
    return _bucket(rolled, bits)


def _bucket(hashes: NDArray[np.uint64], bits: int) -> NDArray[np.intp]:
    return ((hashes * _GOLDEN) >> np.uint64(64 - bits)).astype(np.intp)
