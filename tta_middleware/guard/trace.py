"""What a trace says of an answer: its score, and how far its prompt was moved."""

from __future__ import annotations

from tta_middleware.methods.geometry import cosine, relative_move
from tta_middleware.policy import Policy
from tta_middleware.protocols import Engine
from tta_middleware.types import AnswerScore, Candidate, PromptEmbeddings, Proposal


async def move_of(engine: Engine, question: PromptEmbeddings, point: Proposal | None) -> tuple[float, float, bool]:
    """Cosine and relative norm of a move, and whether its rows still decode to their tokens."""
    prompt = (point.prompt if point else None) or question
    if point is None or point.matrix.shape != prompt.matrix.shape:
        return 1.0, 0.0, True
    changed = (point.matrix != prompt.matrix).any(axis=1)
    if not changed.any():
        return 1.0, 0.0, True
    rows = changed | prompt.user_mask
    moved, origin = point.matrix[rows], prompt.matrix[rows]
    nearest = await engine.nearest_tokens(moved)
    decodes = bool((nearest == prompt.token_ids[rows]).all())
    return cosine(moved, origin), relative_move(moved, origin), decodes


def answer_score(candidate: Candidate | None, policy: Policy) -> AnswerScore | None:
    """A candidate as the trace reports it, held against ``policy``."""
    if candidate is None:
        return None
    decision = policy.decide(candidate.verdict)
    quality = candidate.quality
    return AnswerScore(
        score=candidate.verdict.score,
        flagged=decision.flagged,
        category=decision.category,
        usable=quality.usable if quality else None,
        problems=quality.problems if quality else (),
        shadowed=decision.shadowed,
    )
