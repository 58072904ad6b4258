"""The models that are served, by name, and the policy that a request is answered under."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response

from tta_middleware.aio.streams import close_all
from tta_middleware.chat_model import TTAChatModel
from tta_middleware.errors import ConfigurationError, ModeratorSetupError
from tta_middleware.http_api import ApiError
from tta_middleware.policy import StagePolicies
from tta_middleware.policy.file import DEFAULT_NAME
from tta_middleware.server.answering import ServedModel
from tta_middleware.server.api_errors import unavailable
from tta_middleware.server.chat_request import Stricter, weakened
from tta_middleware.server.front import Call, json_response
from tta_middleware.server.keys import Keys, Rights
from tta_middleware.server.request_log import logger

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
        ready: whether the models are loaded; ``started``, whether anybody has begun to.
    """

    models: Mapping[str, ServedModel]
    allowed_policies: tuple[str, ...] = ()
    ready: bool = False
    started: bool = False
    _created: int = field(default_factory=lambda: int(time.time()), init=False)

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigurationError("a server needs at least one model: {'name': TTAChatModel(...)}")
        for name, served in self.models.items():
            if not isinstance(served, TTAChatModel) and not hasattr(served, "answering"):
                raise ConfigurationError(
                    f"model {name!r}: a served model is a TTAChatModel or an UpstreamModel, which guard what they say; "
                    f"{type(served).__name__} is neither"
                )
        for name in self.allowed_policies:
            for model in self.models:
                self._check_policy(name, model, "allowed_policies")

    def check_keys(self, keys: Keys) -> None:
        """Whether what the keys are bound to is there, and enforced where it has to be.

        Raises:
            ConfigurationError: it is not.
        """
        for name, rights in keys.rights.items():
            if unknown := [model for model in rights.models or () if model not in self.models]:
                raise ConfigurationError(f"key {name!r}: no model {unknown[0]!r} is served")
            for served, model in self.of(rights).items():
                for policy in (*(rights.allow or ()), *((rights.policy,) if rights.policy else ())):
                    self._check_policy(policy, served, f"key {name!r}")
                if rights.enforced and model.policies_in_force(rights.policy).observes:
                    raise ConfigurationError(
                        f"key {name!r} is marked as enforced, and the policy in force for it only observes; "
                        "set the policy's mode = 'enforce', or take the mark off the key"
                    )

    def _check_policy(self, name: str, model: str, where: str) -> None:
        """Raises ConfigurationError where a model knows no policy of that name; says which, and who names it."""
        try:
            self.models[model].policies_in_force(name)
        except ConfigurationError as error:
            raise ConfigurationError(f"{where}, model {model!r}: {error}") from None

    def of(self, rights: Rights) -> Mapping[str, ServedModel]:
        """The models that a key may use."""
        if rights.models is None:
            return self.models
        return {name: model for name, model in self.models.items() if name in rights.models}

    def first_of(self, call: Call) -> ServedModel:
        """The first model that the caller may use.

        Raises:
            ApiError: 404, there is none.
        """
        found = next(iter(self.of(call.caller.rights)), "")
        return self.named(call, found)

    def named(self, call: Call, name: str) -> ServedModel:
        """The model of that name.

        Raises:
            ApiError: 404, there is none that the caller may use.
        """
        models = self.of(call.caller.rights)
        if name not in models:
            listed = ", ".join(models)
            message = f"The model {name[:100]!r} is not served here; GET /v1/models lists {listed}"
            raise ApiError(404, message, code="model_not_found", param="model")
        return models[name]

    def policy(self, call: Call, model: ServedModel) -> Chosen:
        """The policy that the request asks for, or the key's, or the model's own.

        Raises:
            ApiError: 403, the operator does not let the client choose it, or it only observes and the key is enforced.
        """
        rights, asked = call.caller.rights, call.request.headers.get(POLICY_HEADER)
        allowed = self.choices(rights)
        if asked is not None and asked not in allowed:
            listed = ", ".join(allowed) or "none"
            message = f"the policy {asked[:100]!r} may not be chosen with {POLICY_HEADER}; allowed: {listed}"
            raise ApiError(403, message, code="policy_not_allowed", param=POLICY_HEADER)
        chosen = self.chosen(model, asked or rights.policy)
        if rights.enforced and chosen.stages.observes:
            message = f"this key is enforced, and the policy {chosen.name[:100]!r} only observes"
            raise ApiError(403, message, code="policy_not_enforced", param=POLICY_HEADER if asked else None)
        call.record.policy = chosen.name
        call.record.mode = "observe" if chosen.stages.observes else None
        return chosen

    def chosen(self, model: ServedModel, name: str | None) -> Chosen:
        """The policy of that name as it is now; None is the model's own.

        Raises:
            ApiError: 503, its file does not have it any more.
        """
        try:
            return Chosen(name or _own_name(model), model.policies_in_force(name))
        except ConfigurationError as error:
            logger.error("policy %r: %s", name or _own_name(model), error)
            message = "the policy in force for this request is not defined; the server's operator has to mend that"
            raise ApiError(503, message, kind="server_error", code="policy_unavailable") from error

    def choices(self, rights: Rights) -> tuple[str, ...]:
        """What the header may name."""
        if rights.allow is not None:
            return rights.allow
        return self.allowed_policies if rights.policy is None else (rights.policy,)

    async def load(self) -> None:
        """Load all models; requests that come before wait for theirs."""
        self.started = True
        for model in self.models.values():
            await model.aload()
        self.ready = True

    async def loaded(self, model: ServedModel) -> None:
        """Load a model before it answers, where the application's lifespan does not or is not done with it.

        Raises:
            ApiError: 503, it cannot be loaded as it is set up, which is nothing that a client can mend.
        """
        if self.ready:
            return
        try:
            await model.aload()
        except ModeratorSetupError:
            raise
        except ConfigurationError as error:
            raise unavailable() from error

    async def aclose(self) -> None:
        """Free all models, whatever one of them raises."""
        self.ready = False
        await close_all(self.models.values())

    async def listed(self, call: Call) -> Response:
        """``GET /v1/models``."""
        mine = self.of(call.caller.rights)
        return json_response({"object": "list", "data": [self._entry(name) for name in mine]})

    async def shown(self, call: Call) -> Response:
        """``GET /v1/models/NAME``."""
        name = call.request.path_params["name"]
        self.named(call, name)
        return json_response(self._entry(name))

    def _entry(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": "tta-middleware"}


def _own_name(model: ServedModel) -> str:
    """What an answer calls the policy that its operator set."""
    if isinstance(model.policy, str):
        return model.policy
    return DEFAULT_NAME
