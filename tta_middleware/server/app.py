"""The ASGI application: routes, and what lives as long as it does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tta_middleware.errors import ConfigurationError
from tta_middleware.http_api import ApiError
from tta_middleware.server.answering import ServedModel
from tta_middleware.server.answers import Answers
from tta_middleware.server.chat_completions import ChatCompletions
from tta_middleware.server.checks import Checks
from tta_middleware.server.draining import Drain
from tta_middleware.server.front import Call, Endpoint, Front, error_response, json_response
from tta_middleware.server.gate import Gate, Shares
from tta_middleware.server.keys import KeyFile, Keys, KeySource
from tta_middleware.server.models import ServedModels
from tta_middleware.server.playground import Playground
from tta_middleware.server.request_log import REQUEST_ID, Record, new_id
from tta_middleware.server.responses import Responses
from tta_middleware.server.settings import ServerSettings
from tta_middleware.server.telling import page_of, told_by
from tta_middleware.telemetry import server_telemetry

# moderation.server, imported above, says what to install where these are missing.
from starlette.applications import Starlette  # isort: skip
from starlette.exceptions import HTTPException  # isort: skip
from starlette.requests import Request  # isort: skip
from starlette.responses import Response  # isort: skip
from starlette.routing import Route  # isort: skip

if TYPE_CHECKING:
    from tta_middleware.telemetry.otel import ServerTelemetry


def create_app(
    models: Mapping[str, ServedModel], settings: ServerSettings | None = None, *, keys: KeySource | None = None
) -> Starlette:
    """OpenAI's protocol over guarded chat models.

    The models are loaded when the application starts and freed when it stops. Mounted in another application it is not
    started by itself: ``lifespan=lambda _: app.router.lifespan_context(app)`` does that, and without it each model is
    loaded at its first request.

    Args:
        models: chat models, or upstreams, by the names that clients use; the first one's moderator answers checks
            and moderations.
        keys: who may come in; everybody by default.

    Raises:
        ConfigurationError: there is no model, an allowed policy that some model does not know, or a key that is bound
            to what is not there or not enforced.
    """
    if not isinstance(models, Mapping):
        raise ConfigurationError(f"models are by name, {{'small': TTAChatModel(...)}}, not {type(models).__name__}")
    if settings is not None and not isinstance(settings, ServerSettings):
        raise ConfigurationError(f"settings are ServerSettings(limits=Limits(...)), not {type(settings).__name__}")
    if keys is not None and not hasattr(keys, "get"):
        raise ConfigurationError(f"keys are Keys.parse('NAME KEY') or KeyFile(path), not {type(keys).__name__}")
    settings = settings or ServerSettings()
    telemetry = server_telemetry(settings.telemetry) if settings.telemetry else None
    served = ServedModels(dict(models), settings.allowed_policies)
    if isinstance(keys, KeyFile):
        keys.check_with(served.check_keys)
    else:
        served.check_keys((keys or Keys()).get())

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        try:
            await _loaded(served, app)
            yield
        finally:
            await served.aclose()

    drain = Drain()
    app = Starlette(
        routes=_routes(served, settings, keys or Keys(), telemetry, drain),
        exception_handlers={HTTPException: _not_served},
        lifespan=lifespan,
    )
    # A redirect would send key and prompt a second time, in front of a TLS proxy perhaps without TLS.
    app.router.redirect_slashes = False
    app.state.drain = drain
    return app


async def _loaded(served: ServedModels, app: Starlette) -> None:
    try:
        await served.load()
    except Exception as error:
        app.state.startup_error = error  # uvicorn would tell of it with a traceback and an exit code of its own
        raise


def _routes(
    served: ServedModels, settings: ServerSettings, keys: KeySource, telemetry: ServerTelemetry | None, drain: Drain
) -> list[Route]:
    limits = settings.limits
    answers = Gate(limits.concurrency, limits.queue, limits.retry_after)
    checked = Gate(limits.checks, limits.checks, limits.retry_after)
    answering = Answers(served, answers, Shares(limits.retry_after), settings.show_trace)
    checks = Checks(served, checked)
    status = _Status(served)

    def route(method: str, path: str, endpoint: Endpoint, who: KeySource = keys) -> Route:
        # Of what the server says about itself, and its page, nobody is told.
        told = told_by(telemetry, path) if telemetry and path.startswith("/v1/") else None
        return Route(path, Front(endpoint, who, limits, drain, told), methods=[method])

    metrics: list[Route] = []
    if telemetry:
        telemetry.gates({"chat": answers, "checks": checked})
        metrics = [route("GET", "/metrics", page_of(telemetry), Keys() if telemetry.settings.metrics_open else keys)]

    page = Playground(served, show_limits=settings.show_trace)
    playground = [
        route("GET", "/", page.page, Keys()),
        route("GET", "/playground/models", page.settings),
        route("GET", "/playground/{name}", page.part, Keys()),
    ]
    return [
        *(playground if settings.playground else ()),
        route("POST", "/v1/chat/completions", ChatCompletions(answering).create),
        route("POST", "/v1/responses", Responses(answering).create),
        route("GET", "/v1/models", served.listed),
        route("GET", "/v1/models/{name:path}", served.shown),
        route("POST", "/v1/moderations", checks.moderate),
        route("POST", "/v1/checks", checks.check),
        route("GET", "/health", status.health, Keys()),
        route("GET", "/ready", status.ready, Keys()),
        *metrics,
    ]


@dataclass(frozen=True, slots=True)
class _Status:
    """What load balancers ask; without a key."""

    served: ServedModels

    async def health(self, _: Call) -> Response:
        """The process answers."""
        return json_response({"status": "ok"})

    async def ready(self, _: Call) -> Response:
        """The models are loaded; where the application's lifespan does not run, nobody loads them before a request."""
        served = self.served
        status = "ready" if served.ready else "loading" if served.started else "not_started"
        return json_response({"status": status}, 200 if served.ready else 503)


async def _not_served(request: Request, error: Exception) -> Response:
    """Unknown paths and methods, in OpenAI's shape."""
    status = int(getattr(error, "status_code", 500))
    record = Record(new_id(), request.method, request.url.path[:200], status)
    code = record.code = {404: "unknown_url", 405: "method_not_supported"}.get(status)
    record.write()
    headers = {**(getattr(error, "headers", None) or {}), REQUEST_ID: record.id}
    message = f"{request.method} {request.url.path[:200]} is not served here; POST /v1/chat/completions is"
    return error_response(ApiError(status, message, code=code, headers=headers))
