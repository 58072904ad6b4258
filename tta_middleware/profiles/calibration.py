"""Bounds of the quality gate from a model's own answers to harmless prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

import numpy as np

from tta_middleware.errors import EngineError
from tta_middleware.guard.context import check_ended
from tta_middleware.guard.quality import QualityBounds, compression, letter_share, repeated_share, text_problems
from tta_middleware.methods.geometry import mean_row_norm
from tta_middleware.protocols import Engine
from tta_middleware.types import Completion, GenerationRequest, Message, PromptEmbeddings, Sampling

OnAnswer: TypeAlias = Callable[[str], None]

TOKENS: Final = 64
NLL_MARGIN: Final = 1.5
"""Nats per token that an answer may lie above what the model itself says greedily (docs/profiles.md)."""
TEXT_MARGIN: Final = 1.25


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer to a harmless prompt; ``nll`` in nats per token under that prompt."""

    text: str
    tokens: int
    nll: float


@dataclass(frozen=True, slots=True)
class Measurements:
    """What :func:`measure` found.

    Attributes:
        token_norm: mean norm of the user's embedding rows.
        greedy, sampled: answers at temperature 0 and 1, in the order of the prompts.
    """

    token_norm: float
    greedy: tuple[Answer, ...]
    sampled: tuple[Answer, ...]


async def measure(
    engine: Engine,
    conversations: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int = TOKENS,
    seed: int = 0,
    on_answer: OnAnswer = lambda _: None,
) -> Measurements:
    """Decode two answers to each conversation, all side by side, and score them.

    Raises:
        EngineError: the model failed, or broke an answer off.
    """
    prompts = [await engine.embed(messages) for messages in conversations]
    greedy = Sampling(max_new_tokens, seed=seed)
    requests = [GenerationRequest(prompt, greedy) for prompt in prompts]
    requests += [
        GenerationRequest(prompt, replace(greedy, temperature=1.0, seed=seed + i)) for i, prompt in enumerate(prompts)
    ]
    completions = await engine.generate_batch(requests)
    check_ended(*(completion.finish_reason for completion in completions))
    answers = await _scored(engine, [*prompts, *prompts], completions, on_answer)
    rows = np.concatenate([prompt.matrix[prompt.user_mask] for prompt in prompts])
    return Measurements(mean_row_norm(rows), tuple(answers[: len(prompts)]), tuple(answers[len(prompts) :]))


async def _scored(
    engine: Engine, prompts: Sequence[PromptEmbeddings], completions: Sequence[Completion], on_answer: OnAnswer
) -> list[Answer]:
    answers: list[Answer] = []
    for prompt, done in zip(prompts, completions, strict=True):
        (nll,) = await engine.mean_nll(prompt, [done.token_ids])
        answers.append(Answer(done.text, len(done.token_ids), nll))
        on_answer("scored")
    return answers


def bounds_from(found: Measurements) -> QualityBounds:
    """The quality gate's bounds for a model.

    ``max_nll`` is :data:`NLL_MARGIN` above the 99th percentile of the greedy answers that pass the text checks. The
    text bounds are the defaults, loosened where the model's sampled answers, which do not loop, ask for it: code and
    tables, say. Its greedy answers do not count for them, since small models loop.

    Raises:
        EngineError: the model gave no answer that passes the text checks.
    """
    base = QualityBounds()
    fluent = [answer.nll for answer in found.greedy if answer.tokens and not text_problems(answer.text, base)]
    if not fluent:
        raise EngineError("the model gave no usable answer to any prompt, so there is nothing to calibrate by")
    texts = [answer.text for answer in found.sampled if answer.text.strip()]
    repeated = [TEXT_MARGIN * repeated_share(text, base.repetition_from) for text in texts]
    pressed = [TEXT_MARGIN * compression(text) for text in texts]
    letters = [letter_share(text) / TEXT_MARGIN for text in texts]
    return QualityBounds(
        max_nll=round(_quantile(fluent, 0.99) + NLL_MARGIN, 3),
        max_repeated_share=round(min(1.0, max(base.max_repeated_share, _quantile(repeated, 0.99))), 3),
        max_compression=round(max(base.max_compression, _quantile(pressed, 0.99)), 3),
        min_letter_share=round(min(base.min_letter_share, _quantile(letters, 0.01)), 3),
    )


def figures(found: Measurements) -> dict[str, float]:
    """What a profile keeps of the measurements."""
    greedy, sampled = found.greedy, found.sampled
    return {
        "prompts": float(len(greedy)),
        "token_norm": round(found.token_norm, 4),
        "greedy_looping": round(float(np.mean([bool(text_problems(a.text, QualityBounds())) for a in greedy])), 3),
        **{f"greedy_nll_p{q}": round(_quantile([a.nll for a in greedy], q / 100), 3) for q in (50, 95, 99)},
        **{f"sampled_nll_p{q}": round(_quantile([a.nll for a in sampled], q / 100), 3) for q in (5, 50, 95)},
    }


def _quantile(values: Sequence[float], q: float) -> float:
    known = [value for value in values if np.isfinite(value)]
    return float(np.quantile(known, q)) if known else 0.0
