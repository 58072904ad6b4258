"""Reads a packaged artifact: the heads, the word vectors and the calibrations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import as_file, files
from typing import TYPE_CHECKING, Any

import numpy as np

from tta_middleware.errors import ConfigurationError
from tta_middleware.moderation.embedded.features import hash_words
from tta_middleware.moderation.embedded.linear import LinearHeads, Table
from tta_middleware.moderation.embedded.scoring import Calibration
from tta_middleware.moderation.embedded.vectors import WordVectors

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT = 3
_VECTOR_PARTS = ("keys", "rows", "mass", "scale", "bias", "out")


@dataclass(frozen=True, slots=True, eq=False)
class Artifact:
    """A trained model.

    Attributes:
        vectors: a second opinion on the first head; None if the model has none.
    """

    heads: LinearHeads
    calibrations: Mapping[str, Calibration]
    vectors: WordVectors | None = None

    def logits(self, tokens: Sequence[str]) -> NDArray[np.float64]:
        """(heads,) logits of a text's words."""
        logits = self.heads.logits(tokens)
        if self.vectors is not None:
            logits[0] += self.vectors.logit(hash_words(tokens))
        return logits


@lru_cache(maxsize=4)
def load(name: str) -> Artifact:
    """A packaged artifact, read once per process.

    Raises:
        ConfigurationError: the artifact is missing or of another format.
    """
    source = files("tta_middleware.moderation.embedded") / name
    try:
        with as_file(source) as path, np.load(path, allow_pickle=False) as data:
            return _parse(dict(data))
    except (OSError, KeyError, ValueError) as error:
        raise ConfigurationError(
            f"the artifact {name} of the embedded moderator cannot be read ({type(error).__name__}); "
            "reinstall tta-middleware"
        ) from error


def _parse(data: Mapping[str, Any]) -> Artifact:
    if int(data["format"].item()) != FORMAT:
        raise ValueError("another format")
    word, char = (
        Table(data[f"{group}_weights"], data[f"{group}_scale"], data[f"{group}_idf"]) for group in ("word", "char")
    )
    names = tuple(map(str, data["heads"]))
    calibrations = {name: Calibration(*data[f"calibration:{name}"]) for name in names if f"calibration:{name}" in data}
    return Artifact(LinearHeads(names, data["bias"], word, char), calibrations, _vectors(data))


def _vectors(data: Mapping[str, Any]) -> WordVectors | None:
    if "vector_keys" not in data:
        return None
    keys, rows, mass, scale, bias, out = (data[f"vector_{part}"] for part in _VECTOR_PARTS)
    return WordVectors(keys, rows, mass, scale, bias, out, float(data["vector_constant"].item()))
