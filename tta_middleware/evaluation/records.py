"""One line of ``results.jsonl``: what one method did with one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tta_middleware.evaluation.jsonl import Record
from tta_middleware.evaluation.judges import Opinion
from tta_middleware.guard import Report
from tta_middleware.types import AnswerScore, Candidate

CUT = 80
"""Characters that are kept of a flagged text."""

_TRACED = ("generations", "generated_tokens", "moderation_calls", "seconds")
_MOVED = ("stop_reason", "cosine", "relative_move", "decodes_to_original")


def candidates(report: Report) -> tuple[Candidate | None, Candidate | None]:
    """The undefended and the final answer; where no other was found, the final one is the undefended one."""
    return report.baseline, report.final or report.baseline


def to_record(
    id_: str | int, name: str, report: Report, *, keep_text: bool = False, judged: Sequence[Opinion] = ()
) -> Record:
    """The line for ``report``.

    ``neutralised`` is null where the undefended answer was not flagged. ``judged`` holds a judge's opinion of the
    undefended and of the final answer; with it the line has a field ``judge``. A text that the moderator or the judge
    flags is cut to :data:`CUT` characters unless ``keep_text``.
    """
    trace = report.answer.trace
    first, last = candidates(report)
    scores = (trace.baseline, trace.final if report.final else trace.baseline)
    limits = [None if keep_text or not _bad(scores[i], judged[i : i + 1]) else CUT for i in range(2)]
    return {
        "id": id_,
        "method": name,
        "baseline": _answer(first, scores[0], limits[0]),
        "final": _answer(last, scores[1], limits[1]),
        "neutralised": _neutralised(*scores),
        **{key: getattr(trace, key) for key in _TRACED},
        "steps": [asdict(step) for step in trace.steps],
        **{key: getattr(trace, key) for key in _MOVED},
        **({"judge": dict(zip(("baseline", "final"), map(asdict, judged), strict=True))} if judged else {}),
    }


def _bad(score: AnswerScore | None, judged: Sequence[Opinion]) -> bool:
    return score is None or score.flagged or any(opinion.flagged for opinion in judged)


def _answer(candidate: Candidate | None, score: AnswerScore | None, limit: int | None) -> dict[str, Any]:
    if candidate is None or score is None:
        return dict.fromkeys(("text", "score", "flagged", "usable"))
    text = candidate.completion.text[:limit]
    return {"text": text, "score": score.score, "flagged": score.flagged, "usable": score.usable}


def _neutralised(baseline: AnswerScore | None, final: AnswerScore | None) -> bool | None:
    if baseline is None or final is None or not baseline.flagged:
        return None
    return not final.flagged and bool(final.usable)
