"""One line of ``results.jsonl``: what one method did with one prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tta_middleware.evaluation.measures import Measured
from tta_middleware.files.jsonl import Record
from tta_middleware.files.prompts import Prompt
from tta_middleware.guard.refusal_opening import is_refusal
from tta_middleware.guard.settings import Report
from tta_middleware.types import AnswerScore, Candidate

CUT = 80
"""Characters that are kept of a flagged text."""

PARTS = ("baseline", "final")
"""The two answers of a line."""

_TRACED = ("generations", "generated_tokens", "moderation_calls", "move")
_ANSWER = ("text", "score", "flagged", "usable", "category", "nll", "refusal", "relevance")


@dataclass(frozen=True, slots=True)
class Setting:
    """Under what one method was run on one prompt.

    Attributes:
        first_seconds: what decoding the shared first answer took; added to the method's own seconds.
        concurrency: prompts at work at once; seconds compare only where it is 1.
    """

    seed: int
    method: str
    concurrency: int = 1
    first_seconds: float = 0.0


def candidates(report: Report) -> tuple[Candidate | None, Candidate | None]:
    """The undefended and the final answer; where no other was found, the final one is the undefended one."""
    return report.baseline, report.final or report.baseline


def to_record(
    prompt: Prompt,
    setting: Setting,
    report: Report,
    measured: Sequence[Measured],
    *,
    iterations: float = 0.0,
    unguarded: str | None = None,
    keep_text: bool = False,
) -> Record:
    """The line for ``report``.

    ``neutralised`` is null where the undefended answer was not flagged. ``measured`` holds what was found about the
    undefended and the final answer; with judges' opinions the line has a field ``judges``. ``unguarded`` is what the
    model says without any guard, decoded apart: ``identical`` tells whether exactly that was given out. A text that
    the moderator or a judge flags is cut to :data:`CUT` characters unless ``keep_text``.
    """
    trace = report.answer.trace
    scores = (trace.baseline, trace.final if report.final else trace.baseline)
    answers = [
        _answer(candidate, score, found, None if keep_text or not _bad(score, found) else CUT)
        for candidate, score, found in zip(candidates(report), scores, measured, strict=True)
    ]
    return {
        "id": prompt.id,
        "seed": setting.seed,
        "method": setting.method,
        "category": prompt.category,
        "benign": prompt.benign,
        "baseline": answers[0],
        "final": answers[1],
        "neutralised": _neutralised(*scores),
        "refused": is_refusal(report.answer.text),
        "identical": None if unguarded is None else report.answer.text == unguarded,
        **{key: getattr(trace, key) for key in _TRACED},
        "seconds": trace.seconds + setting.first_seconds,
        "concurrency": setting.concurrency,
        "iterations": iterations,
        "steps": [asdict(step) for step in trace.steps],
        "stop_reason": trace.stop_reason,
        "cosine": _number(trace.cosine),
        "relative_move": _number(trace.relative_move),
        "decodes_to_original": trace.decodes_to_original,
        **_judges(measured),
    }


def _judges(measured: Sequence[Measured]) -> dict[str, Any]:
    names = measured[0].opinions
    found = {name: dict(zip(PARTS, (asdict(each.opinions[name]) for each in measured), strict=True)) for name in names}
    return {"judges": found} if found else {}


def _bad(score: AnswerScore | None, found: Measured) -> bool:
    return score is None or score.flagged or any(said.flagged for said in found.opinions.values())


def _answer(
    candidate: Candidate | None, score: AnswerScore | None, found: Measured, limit: int | None
) -> dict[str, Any]:
    if candidate is None or score is None:
        return dict.fromkeys(_ANSWER)
    nll = candidate.quality.nll if candidate.quality else None
    return {
        "text": candidate.completion.text[:limit],
        "score": score.score,
        "flagged": score.flagged,
        "usable": score.usable,
        "category": score.category,
        "nll": _number(nll),
        "refusal": found.refusal,
        "relevance": found.relevance,
    }


def _number(value: float | None) -> float | None:
    """JSON has no NaN: what could not be measured is null."""
    return None if value is None or math.isnan(value) else value


def _neutralised(baseline: AnswerScore | None, final: AnswerScore | None) -> bool | None:
    if baseline is None or final is None or not baseline.flagged:
        return None
    return not final.flagged and bool(final.usable)
