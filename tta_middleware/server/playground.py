"""The playground: a page at ``/`` that chats with the served models and shows what the guard did (docs/playground.md).

The page is plain files beside this module. It is held to them by its headers: no script, style or connection from
anywhere else, no markup from text, no frame around it. It knows no key; whoever uses it types one in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Final

from starlette.responses import Response

from tta_middleware.http_api import ApiError
from tta_middleware.policy import Policy
from tta_middleware.policy.coverage import categories_of
from tta_middleware.server.answering import ServedModel
from tta_middleware.server.front import Call, json_response
from tta_middleware.server.keys import Rights
from tta_middleware.server.models import Chosen, ServedModels
from tta_middleware.types import CATEGORIES

PAGE: Final = "index.html"

_TYPES: Final[Mapping[str, str]] = {
    PAGE: "text/html; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "story.js": "text/javascript; charset=utf-8",
    "stream.js": "text/javascript; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
}
"""The files that make the page; no other is given out."""

HEADERS: Final[Mapping[str, str]] = {
    "cache-control": "no-cache",
    "content-security-policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self'",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


@dataclass(frozen=True, slots=True)
class Playground:
    """Its endpoints.

    Attributes:
        show_limits: whether the page is told the policies' thresholds; as the trace, they are for who may see scores.
    """

    models: ServedModels
    show_limits: bool = True

    async def page(self, _: Call) -> Response:
        """The page itself."""
        return _file(PAGE)

    async def part(self, call: Call) -> Response:
        """A script, the style or the icon.

        Raises:
            ApiError: 404, there is no such file.
        """
        name = call.request.path_params["name"]
        if name not in _TYPES or name == PAGE:
            raise ApiError(404, "the playground has no such file", code="unknown_url")
        return _file(name)

    async def settings(self, call: Call) -> Response:
        """What a user of the page may choose from: models, policies, and how far they may be made stricter."""
        mine = self.models.of(call.caller.rights)
        return json_response({"models": [self._about(call, name, model) for name, model in mine.items()]})

    def _about(self, call: Call, name: str, model: ServedModel) -> dict[str, Any]:
        return {
            "name": name,
            "prompt_check": model.prompt_check,
            "temperature": getattr(model, "temperature", None),  # an upstream's own is not known here
            "max_new_tokens": getattr(model, "max_new_tokens", None),
            "most_tokens": call.most_tokens,
            "policies": [self._policy(model, chosen) for chosen in self._choices(call.caller.rights, model)],
        }

    def _choices(self, rights: Rights, model: ServedModel) -> Iterator[Chosen]:
        """The policy of the key or the model, and those that the header may name."""
        own = self.models.chosen(model, rights.policy)
        yield own
        for name in self.models.choices(rights):
            if name != own.name:
                yield self.models.chosen(model, name)

    def _policy(self, model: ServedModel, chosen: Chosen) -> dict[str, Any]:
        policy = chosen.stages.output
        if not self.show_limits:
            return {"name": chosen.name, "threshold": None, "limits": {}}
        return {"name": chosen.name, "threshold": policy.threshold, "limits": _limits(model, policy)}


def _limits(model: ServedModel, policy: Policy) -> dict[str, float]:
    """The threshold of each category that the moderator scores and the policy enforces."""
    scored = categories_of(model.scorer) or CATEGORIES
    return {name: policy.limit(name) for name in scored if name not in policy.shadow}


def _file(name: str) -> Response:
    content = files(__package__).joinpath("page", name).read_bytes()
    return Response(content, headers={**HEADERS, "content-type": _TYPES[name]})
