"""Gets a method what it needs of the model and the conversation before its search begins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from tta_middleware.errors import ConfigurationError
from tta_middleware.methods.base import Method, Start
from tta_middleware.protocols import Engine
from tta_middleware.types import BoolVector, FloatMatrix, IntVector, Message, PromptEmbeddings

_GRID = 8


async def prepare(
    engine: Engine,
    method: Method,
    messages: Sequence[Message],
    prompt: PromptEmbeddings,
    assistant_prefix: str,
    loss: float,
    rng: np.random.Generator,
    tools: Sequence[Mapping[str, Any]] = (),
) -> Start:
    """What ``method`` starts from: ``prompt``, the directions of its words, and the prompt under its reminders.

    A reminder that the conversation cannot take is left out of the variants: it makes the prompt longer than the
    model's context, or the chat template refuses it.

    Raises:
        ConfigurationError: a word is blank.
    """
    words, extra = method.needs.words, {"tools": tools} if tools else {}
    rows: Sequence[FloatMatrix] = list(await engine.directions(words)) if words else []
    variants = {}
    for reminder in method.needs.reminders:
        with suppress(ConfigurationError):
            turns = reminded(messages, reminder)
            variants[reminder] = await engine.embed(turns, assistant_prefix=assistant_prefix, **extra)
    directions = dict(zip(words, rows, strict=True))
    reach = await _reach(engine, [prompt, *variants.values()], directions, method.needs.reach)
    return Start(prompt, loss, rng, directions, variants, reach)


async def _reach(
    engine: Engine, prompts: Sequence[PromptEmbeddings], directions: Mapping[str, FloatMatrix], most: float
) -> dict[str, dict[int, float]]:
    """Per word and user's token the longest of ``_GRID`` evenly spaced steps that leaves the token nearest."""
    rows = {token: row for prompt in prompts for token, row in _user_rows(prompt)}
    if not (most and directions and rows):
        return {word: {} for word in directions}
    tokens, origin = np.array(list(rows)), np.array(list(rows.values()))
    full = np.array([most * np.linalg.norm(origin, axis=1)[:, None] * step for step in directions.values()])
    share = np.where(await _stays(engine, origin + full, tokens), 1.0, 0.0)
    # Most rows can go all the way; only the others are worth a closer look.
    short = np.nonzero(share == 0.0)
    parts = np.linspace(0.0, 1.0, _GRID, endpoint=False, dtype=np.float32)[1:]
    points = origin[short[1]] + parts[:, None, None] * full[short]
    share[short] = (await _stays(engine, points, tokens[short[1]])).sum(axis=0) / _GRID
    found = (most * share).tolist()
    return {word: dict(zip(rows, line, strict=True)) for word, line in zip(directions, found, strict=True)}


async def _stays(engine: Engine, points: FloatMatrix, tokens: IntVector) -> BoolVector:
    """Whether each of the (m, n, d) points is nearest to its own of the (n,) tokens."""
    nearest = await engine.nearest_tokens(points.reshape(-1, points.shape[-1]))
    stays: BoolVector = nearest.reshape(points.shape[:-1]) == tokens
    return stays


def _user_rows(prompt: PromptEmbeddings) -> Iterable[tuple[int, FloatMatrix]]:
    return zip(prompt.token_ids[prompt.user_mask].tolist(), prompt.matrix[prompt.user_mask], strict=True)


def reminded(messages: Sequence[Message], reminder: str) -> list[Message]:
    """The conversation with ``reminder`` at the end of its first system message, or as one where it has none."""
    if messages and messages[0].role == "system":
        return [Message("system", f"{messages[0].content}\n\n{reminder}"), *messages[1:]]
    return [Message("system", reminder), *messages]
