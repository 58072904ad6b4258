"""How far a conversation's rows may go along a word and still read as their own tokens; looked up word by word."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tta_middleware.protocols import Engine
from tta_middleware.types import BoolVector, FloatMatrix, IntVector, PromptEmbeddings

_GRID = 8


@dataclass(slots=True)
class Reach:
    """The reach of the user's rows, for the words that proposals step along.

    A look-up compares rows with the whole table in the thread that decodes, so it is put off until a word is wanted.

    Attributes:
        prompts: the conversation as it may be asked; their user rows are those that move.
        directions: per word, a (d,) row of length 1.
        most: the longest step that is asked about, as a share of a row's norm; 0 where nobody wants to know.
        found: per word that was looked up, the longest of ``_GRID`` evenly spaced steps for each of the user's token
            ids that leaves that token nearest. The search that owns this writes it; its optimiser reads it.
    """

    engine: Engine
    prompts: Sequence[PromptEmbeddings]
    directions: Mapping[str, FloatMatrix]
    most: float
    found: dict[str, Mapping[int, float]] = field(default_factory=dict)

    async def look_up(self, words: Iterable[str]) -> None:
        """Find the reach along each of ``words`` that is not known yet."""
        new = [word for word in dict.fromkeys(words) if word not in self.found]
        rows = {token: row for prompt in self.prompts for token, row in _user_rows(prompt)}
        if not (self.most and new and rows):
            return
        tokens, origin = np.array(list(rows)), np.array(list(rows.values()))
        lengths = self.most * np.linalg.norm(origin, axis=1)[:, None]
        full = np.array([lengths * self.directions[word] for word in new])
        share = np.where(await self._stays(origin + full, tokens), 1.0, 0.0)
        # Most rows can go all the way; only the others are worth a closer look.
        short = np.nonzero(share == 0.0)
        parts = np.linspace(0.0, 1.0, _GRID, endpoint=False, dtype=np.float32)[1:]
        if len(short[0]):
            points = origin[short[1]] + parts[:, None, None] * full[short]
            share[short] = (await self._stays(points, tokens[short[1]])).sum(axis=0) / _GRID
        for word, line in zip(new, (self.most * share).tolist(), strict=True):
            self.found[word] = dict(zip(rows, line, strict=True))

    async def _stays(self, points: FloatMatrix, tokens: IntVector) -> BoolVector:
        """Whether each of the (m, n, d) points is nearest to its own of the (n,) tokens."""
        nearest = await self.engine.nearest_tokens(points.reshape(-1, points.shape[-1]))
        stays: BoolVector = nearest.reshape(points.shape[:-1]) == tokens
        return stays


def _user_rows(prompt: PromptEmbeddings) -> Iterable[tuple[int, FloatMatrix]]:
    return zip(prompt.token_ids[prompt.user_mask].tolist(), prompt.matrix[prompt.user_mask], strict=True)
