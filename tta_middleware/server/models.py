"""The models that are served, by name, and the policy that a request is answered under."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response

from tta_middleware.errors import ConfigurationError
from tta_middleware.moderation.server import ApiError
from tta_middleware.policy import StagePolicies
from tta_middleware.policy.file import DEFAULT_NAME
from tta_middleware.server.answering import ServedModel
from tta_middleware.server.chat_request import Stricter, weakened
from tta_middleware.server.front import Call, json_response

POLICY_HEADER = "x-tta-policy"
OUTCOME_HEADER = "x-tta-outcome"
MODE_HEADER = "x-tta-mode"
"""Is there, with ``observe``, where the policy withholds nothing."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """The policy of one request, as its file had it when the request came.

    Attributes:
        name: what the operator calls it.
    """

    name: str
    stages: StagePolicies

    def stricter(self, asked: Stricter | None) -> Chosen:
        """This policy with the lower thresholds that a client asks for.

        Raises:
            ApiError: 403, one of them is higher than the operator's.
            ConfigurationError: a category is unknown.
        """
        if asked is None or (asked.threshold is None and not asked.categories):
            return self
        if problem := self.stages.weakened_by(asked.threshold, asked.categories):
            raise weakened(problem, "tta")
        return Chosen(f"{self.name} (stricter)", self.stages.lowered(asked.threshold, asked.categories))

    @property
    def header(self) -> dict[str, str]:
        mode = {MODE_HEADER: "observe"} if self.stages.observes else {}
        return {POLICY_HEADER: self.name.encode("ascii", "replace").decode()} | mode


@dataclass(eq=False, slots=True)
class ServedModels:
    """Chat models by the names that clients use; the first is the one that checks and moderations go by.

    Attributes:
        allowed_policies: what the header may name.
        ready: whether the models are loaded.
    """

    models: Mapping[str, ServedModel]
    allowed_policies: tuple[str, ...] = ()
    ready: bool = False
    _created: int = field(default_factory=lambda: int(time.time()), init=False)

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigurationError("a server needs at least one model: {'name': TTAChatModel(...)}")
        for name in self.allowed_policies:
            for model in self.models.values():
                model.policies_in_force(name)

    @property
    def first(self) -> ServedModel:
        return next(iter(self.models.values()))

    def named(self, name: str) -> ServedModel:
        """The model of that name.

        Raises:
            ApiError: 404, there is none.
        """
        if name not in self.models:
            listed = ", ".join(self.models)
            message = f"The model {name[:100]!r} is not served here; GET /v1/models lists {listed}"
            raise ApiError(404, message, code="model_not_found", param="model")
        return self.models[name]

    def policy(self, call: Call, model: ServedModel) -> Chosen:
        """The policy that the request asks for, or the model's own.

        Raises:
            ApiError: 403, the operator does not let clients choose it.
        """
        asked = call.request.headers.get(POLICY_HEADER)
        if asked is not None and asked not in self.allowed_policies:
            listed = ", ".join(self.allowed_policies) or "none"
            message = f"the policy {asked[:100]!r} may not be chosen with {POLICY_HEADER}; allowed: {listed}"
            raise ApiError(403, message, code="policy_not_allowed", param=POLICY_HEADER)
        chosen = self.chosen(model, asked)
        call.record.policy = chosen.name
        call.record.mode = "observe" if chosen.stages.observes else None
        return chosen

    def chosen(self, model: ServedModel, name: str | None) -> Chosen:
        """The policy of that name as it is now; None is the model's own."""
        return Chosen(name or _own_name(model), model.policies_in_force(name))

    async def load(self) -> None:
        """Load all models; requests that come before wait for theirs."""
        for model in self.models.values():
            await model.aload()
        self.ready = True

    async def aclose(self) -> None:
        """Free all models."""
        self.ready = False
        for model in self.models.values():
            await model.aclose()

    async def listed(self, _: Call) -> Response:
        """``GET /v1/models``."""
        return json_response({"object": "list", "data": [self._entry(name) for name in self.models]})

    async def shown(self, call: Call) -> Response:
        """``GET /v1/models/NAME``."""
        name = call.request.path_params["name"]
        self.named(name)
        return json_response(self._entry(name))

    def _entry(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": "tta-middleware"}


def _own_name(model: ServedModel) -> str:
    """What an answer calls the policy that its operator set."""
    if isinstance(model.policy, str):
        return model.policy
    return DEFAULT_NAME
