"""OpenAI's inline moderation: scores of prompt and answer in the answer itself.

The operator's policy holds whatever a client asks for: ``block`` for the input adds a check of the prompt where the
operator has none, and nothing that is asked takes a check away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tta_middleware.call_text import json_reading
from tta_middleware.errors import ModerationError
from tta_middleware.moderation.server import result_of
from tta_middleware.observing import AnyStage, observer
from tta_middleware.policy import Policy, StagePolicies
from tta_middleware.policy.coverage import told
from tta_middleware.policy.verdicts import verdict_on
from tta_middleware.protocols import Moderator
from tta_middleware.types import Verdict


async def inline_moderation(
    moderator: Moderator, stages: StagePolicies, asked: str, answers: Sequence[tuple[str, dict[str, Any]]]
) -> dict[str, Any]:
    """``moderation`` of answers: what the moderator says of ``asked`` and of each answer's text; beside it its trace.

    There is a result for each answer, in their order, or the first error.
    """
    outputs = [
        _withheld(trace, moderator.name) or await _scores(told(moderator, stages.output), stages.output, said, "output")
        for said, trace in answers
    ]
    errors = [output for output in outputs if output["type"] == "error"]
    results = [result for output in outputs for result in output.get("results", ())]
    return {
        "input": await _scores(told(moderator, stages.prompt, "prompt"), stages.prompt, asked, "prompt"),
        "output": errors[0] if errors else _results(results, outputs[0]["model"]),
    }


async def _scores(moderator: Moderator, policy: Policy, text: str, stage: AnyStage) -> dict[str, Any]:
    try:
        with observer().checking_alone(moderator.name, stage) as check:
            verdict = await verdict_on(moderator, text, json_reading(text))
            check.scored(verdict, policy)
    except ModerationError as error:
        return {"type": "error", "code": type(error).__name__, "message": "the moderator gave no verdict"}
    return _results([_result(verdict, policy)], verdict.model)


def _result(verdict: Verdict, policy: Policy) -> dict[str, Any]:
    """A verdict as the policy sees it: categories by their own thresholds, ``flagged`` by its limits."""
    base = policy.threshold if policy.threshold is not None else 1.0
    limits = {name: policy.categories.get(name, base) for name in verdict.scores}
    told = result_of(verdict, base)
    told["categories"] |= {name: verdict.scores[name] >= limit for name, limit in limits.items()}
    told["flagged"] = policy.decide(verdict).reached
    return {"type": "moderation_result", "model": verdict.model, **told}


def _withheld(trace: dict[str, Any], moderator: str) -> dict[str, Any] | None:
    """What is known of an answer that was blocked: the category that decided, and its score."""
    if trace.get("outcome") != "blocked":
        return None
    found = trace.get("baseline")
    if not found or not found["flagged"]:
        message = f"no answer was scored: {trace.get('stop_reason', 'blocked')}"
        return {"type": "error", "code": "no_output", "message": message}
    category = found["category"]
    result = {
        "type": "moderation_result",
        "model": moderator,
        "flagged": True,
        "categories": {category: True},
        "category_scores": {category: found["score"]},
        "category_applied_input_types": {category: ["text"]},
    }
    return _results([result], moderator)


def _results(results: list[dict[str, Any]], model: str) -> dict[str, Any]:
    return {"type": "moderation_results", "model": model, "results": results}
