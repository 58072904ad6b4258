"""``POST /v1/checks``: a text in, the policy's decision out; and ``POST /v1/moderations``."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any, Literal

from starlette.responses import Response

from tta_middleware.call_text import json_reading
from tta_middleware.errors import ModerationRejectedError
from tta_middleware.http_api import json_object
from tta_middleware.moderation.server import Moderations, refused
from tta_middleware.observing import observer
from tta_middleware.policy import Stage
from tta_middleware.policy.coverage import covering, told
from tta_middleware.policy.verdicts import verdict_on
from tta_middleware.server.chat_request import Body, read_request
from tta_middleware.server.front import Call, json_response
from tta_middleware.server.gate import Gate
from tta_middleware.server.models import OUTCOME_HEADER, Chosen, ServedModels
from tta_middleware.types import Subject, Verdict


class CheckRequest(Body):
    """What is to be decided.

    Attributes:
        text: what is checked, as it was written and as a reader of JSON decodes it.
        prompt: what it answers, for moderators that look at that.
        stage: the policy's part for what users write (``prompt``), or a model answers (``output``) or thinks
            (``reasoning``).
        model: the served model whose moderator and policy decide; the first one by default.
    """

    text: str
    prompt: str | None = None
    stage: Literal["prompt", "output", "reasoning"] = "output"
    model: str | None = None


@dataclass(eq=False, slots=True)
class Checks:
    """The endpoints that score texts and generate nothing."""

    models: ServedModels
    gate: Gate

    async def check(self, call: Call) -> Response:
        """The decision on one text. Without a verdict there is none: an error, whatever the policy says of outages.

        Raises:
            ApiError: the request cannot be read, or there is no place for it.
            ModerationError: there is no verdict.
        """
        asked = read_request(CheckRequest, json_object(call.body))
        model = self.models.first_of(call) if asked.model is None else self.models.named(call, asked.model)
        chosen = self.models.policy(call, model)
        call.record.model = asked.model
        await call.held.enter_async_context(self.gate.places())
        subject: Subject = "prompt" if asked.stage == "prompt" else "answer"
        moderator = told(covering(model.scorer, chosen.stages), chosen.stages.at(asked.stage), subject)
        try:
            with observer().checking_alone(moderator.name, asked.stage) as check:
                verdict = await verdict_on(moderator, asked.text, json_reading(asked.text), prompt=asked.prompt)
                check.scored(verdict, chosen.stages.at(asked.stage))
        except ModerationRejectedError as error:
            if answer := refused(error, "text"):
                raise answer from error
            raise
        found = _decision(verdict, chosen, asked.stage)
        call.record.outcome = found["status"]
        return json_response(found, headers=chosen.header | {OUTCOME_HEADER: found["status"]})

    async def moderate(self, call: Call) -> Response:
        """As OpenAI's endpoint, by the first model's moderator and its own threshold.

        Raises:
            ApiError: the request cannot be read, there is no place for it, or there is no verdict.
        """
        await call.held.enter_async_context(self.gate.places())
        moderator = self.models.first_of(call).scorer
        return json_response(await Moderations(moderator, moderator.name).create(json_object(call.body)))


def _decision(verdict: Verdict, chosen: Chosen, stage: Stage) -> dict[str, Any]:
    decision = chosen.stages.at(stage).decide(verdict)
    return {
        "id": f"check-{secrets.token_hex(14)}",
        "object": "check",
        "status": "blocked" if decision.flagged else "passed",
        "flagged": decision.flagged,
        "category": decision.category,
        "score": verdict.score,
        "category_scores": dict(verdict.scores),
        "shadowed": list(decision.shadowed),
        "mode": chosen.stages.at(stage).mode,
        "observed": decision.observed,
        "stage": stage,
        "policy": chosen.name,
        "model": verdict.model,
    }
