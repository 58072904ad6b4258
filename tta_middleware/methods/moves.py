"""Moves that repaired a prompt, as data: taken from a winner, made again on the same prompt, kept in a file."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tta_middleware.errors import ConfigurationError
from tta_middleware.methods.base import Start
from tta_middleware.types import FloatMatrix, PromptEmbeddings, Proposal

HalfMatrix: TypeAlias = NDArray[np.float16]


@dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """A move that worked.

    Attributes:
        rows: (n,) indices of the moved rows.
        delta: (n, d) float16 difference of those rows, or (1, d) where all of them moved alike.
        label: the kind of move.
        variant: hash of the reminder under which it was asked; empty for the question itself.
        temperature: what it was sampled at, where that was not the request's.
    """

    rows: NDArray[np.int32]
    delta: HalfMatrix
    label: str
    variant: str = ""
    temperature: float | None = None

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + self.delta.nbytes

    def fits(self, prompt: PromptEmbeddings) -> bool:
        """Whether the move can be made on this prompt."""
        tokens, width = prompt.matrix.shape
        inside = not len(self.rows) or (self.rows.min() >= 0 and self.rows.max() < tokens)
        return bool(inside) and self.delta.shape[1] == width


def recipe_of(proposal: Proposal, start: Start) -> Recipe | None:
    """What ``proposal`` does to the prompt; None if it moves nothing, so that chance made the difference."""
    origin = proposal.prompt or start.prompt
    variant = ""
    if proposal.prompt is not None and proposal.prompt is not start.prompt:
        names = [text for text, prompt in start.variants.items() if prompt is proposal.prompt]
        if not names:
            return None
        variant = short_hash(names[0])
    delta = proposal.matrix - origin.matrix
    rows = np.flatnonzero(delta.any(axis=1)).astype(np.int32)
    if not len(rows) and not variant:
        return None
    moves = delta[rows]
    if _alike(moves):
        moves = moves.mean(axis=0, keepdims=True)
    half = moves.astype(np.float16)
    if not np.isfinite(half).all():
        return None
    return Recipe(rows, half, proposal.label, variant, proposal.temperature)


def _alike(moves: FloatMatrix) -> bool:
    """Whether all rows moved by one vector, but for rounding."""
    if len(moves) < 2:
        return False
    return float(np.abs(moves - moves[0]).max()) <= 1e-4 * float(np.abs(moves).max())


def proposal_of(recipe: Recipe, start: Start) -> Proposal | None:
    """The remembered move on the prompt of ``start``; None if it does not fit."""
    variants = {short_hash(text): prompt for text, prompt in start.variants.items()} | {"": start.prompt}
    origin = variants.get(recipe.variant)
    if origin is None or not recipe.fits(origin):
        return None
    matrix = origin.matrix.copy()
    matrix[recipe.rows] += recipe.delta.astype(np.float32)
    return Proposal(
        matrix,
        temperature=recipe.temperature,
        prompt=origin if recipe.variant else None,
        label=f"memory:{recipe.label}",
    )


def write_recipes(path: Path, recipes: Mapping[str, Recipe]) -> None:
    """Write recipes by key, whole or not at all; the file is readable by its owner alone."""
    index = [
        {"key": key, "label": recipe.label, "variant": recipe.variant, "temperature": recipe.temperature}
        for key, recipe in recipes.items()
    ]
    arrays: dict[str, Any] = {"index": np.frombuffer(json.dumps(index).encode(), dtype=np.uint8)}
    for number, recipe in enumerate(recipes.values()):
        arrays |= {f"rows{number}": recipe.rows, f"delta{number}": recipe.delta}
    draft = path.with_name(f"{path.name}.part")
    # For the owner alone: the file tells which prompts were flagged to somebody who can guess them.
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        np.savez(file, **arrays)
    draft.replace(path)


def read_recipes(path: Path) -> dict[str, Recipe]:
    """The recipes of a file, in the order they were written.

    Raises:
        ConfigurationError: the file cannot be read, or holds something else.
    """
    try:
        # Opened here, since numpy leaves the file of a broken archive open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            index = json.loads(stored["index"].tobytes())
            return {str(entry["key"]): _recipe(stored, number, entry) for number, entry in enumerate(index)}
    except OSError as error:
        raise ConfigurationError(f"cannot read the repair memory {path}: {error.strerror or 'no .npz file'}") from None
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        raise ConfigurationError(f"{path} is no repair memory; delete it to begin anew") from None


def _recipe(stored: Any, number: int, entry: Mapping[str, Any]) -> Recipe:
    rows, delta = stored[f"rows{number}"], stored[f"delta{number}"]
    one_each = delta.ndim == 2 and len(delta) in (1, len(rows))
    if rows.dtype != np.int32 or delta.dtype != np.float16 or rows.ndim != 1 or not one_each:
        raise ValueError("a move has an unexpected shape")
    temperature = entry["temperature"]
    if temperature is not None:
        temperature = float(temperature)
    return Recipe(rows, delta, str(entry["label"]), str(entry["variant"]), temperature)


def short_hash(text: str) -> str:
    """32 hexadecimal digits that stand for a text."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
