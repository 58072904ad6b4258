"""Writes an artifact: quantised weights in a zip whose bytes depend on nothing but its content."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.fit import Linear
from tta_middleware.moderation.embedded.artifact import FORMAT
from tta_middleware.moderation.embedded.vectors import WordVectors

EPOCH = (1980, 1, 1, 0, 0, 0)


def arrays(
    model: Linear, vectors: WordVectors | None, calibrations: Mapping[str, NDArray[np.float64]]
) -> dict[str, NDArray[Any]]:
    """What tta_middleware.moderation.embedded.artifact reads."""
    split = len(model.word_idf)
    word, word_scale = _quantise(model.weights[:split] * model.word_idf[:, None].astype(np.float64))
    char, char_scale = _quantise(model.weights[split:] * model.char_idf[:, None].astype(np.float64) * model.char_mix)
    named = {f"calibration:{name}": knots for name, knots in calibrations.items()}
    return {
        "format": np.array(FORMAT),
        "heads": np.array(model.heads),
        "bias": model.bias.astype(np.float64),
        "word_weights": word,
        "word_scale": word_scale,
        "word_idf": model.word_idf,
        "char_weights": char,
        "char_scale": char_scale,
        "char_idf": model.char_idf,
        **named,
        **({} if vectors is None else {f"vector_{part}": np.asarray(value) for part, value in asdict(vectors).items()}),
    }


def _quantise(weights: NDArray[np.float64]) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
    """int8 per head; the rare weights beyond 127 steps are clipped, so that the many small ones keep their bits."""
    peak = np.quantile(np.abs(weights[np.abs(weights).sum(axis=1) > 0]), 0.9999, axis=0)
    scale = peak / 127
    return np.clip(np.rint(weights / scale), -127, 127).astype(np.int8), scale


def write(path: Path, content: Mapping[str, NDArray[Any]]) -> str:
    """Write a compressed .npz; gives its sha256."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in sorted(content):
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.asarray(content[name], order="C"), allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, buffer.getvalue(), compresslevel=9)
    return hashlib.sha256(path.read_bytes()).hexdigest()
