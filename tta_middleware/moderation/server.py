"""An OpenAI-compatible ``/v1/moderations`` over any moderator (extra ``server``).

Texts and keys appear neither in logs nor in errors. The server speaks plain HTTP; put a TLS proxy in front of it
where the network is not trusted.
"""

from __future__ import annotations

import hmac
import logging
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio

from tta_middleware.errors import (
    ConfigurationError,
    MissingExtraError,
    ModerationError,
    ModerationRejectedError,
    ModerationUnavailableError,
)
from tta_middleware.http_api import KEEP_ALIVE_SECONDS, ApiError, bearer, json_object, read_body, wrong_key
from tta_middleware.moderation.embedded.moderator import MODEL
from tta_middleware.observing import observer
from tta_middleware.policy import Policy
from tta_middleware.policy.verdicts import encodable, load, verdicts_on
from tta_middleware.protocols import Moderator
from tta_middleware.types import CATEGORIES, Verdict

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route
except ImportError as missing:
    raise MissingExtraError("the server needs the extra: pip install 'tta-middleware[server]'") from missing

_logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 1_048_576
MAX_INPUTS = 256
GRACE_SECONDS = 10


def create_app(
    moderator: Moderator,
    *,
    model_name: str = MODEL,
    max_body_bytes: int = MAX_BODY_BYTES,
    max_inputs: int = MAX_INPUTS,
    api_key: str | None = None,
) -> Starlette:
    """An ASGI application with ``POST /v1/moderations`` and ``GET /health``.

    Args:
        moderator: scores the texts; closed when the application shuts down.
        model_name: reported where the request names no model; otherwise the request's model is echoed.
        max_body_bytes: larger requests get 413.
        max_inputs: longer lists get 400.
        api_key: when set, requests must carry it as bearer token.

    Raises:
        ConfigurationError: a limit below 1.
    """
    if min(max_body_bytes, max_inputs) < 1:
        raise ConfigurationError("max_body_bytes and max_inputs must be at least 1")
    endpoint = _Endpoint(Moderations(moderator, model_name, max_inputs), max_body_bytes, api_key)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        try:
            await load(moderator)
            yield
        finally:
            await moderator.aclose()

    return Starlette(
        routes=[
            Route("/v1/moderations", endpoint.moderations, methods=["POST"]),
            Route("/health", endpoint.health, methods=["GET"]),
        ],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error},
        lifespan=lifespan,
    )


def serve(host: str = "127.0.0.1", port: int = 8081, *, moderator: Moderator | None = None, **options: Any) -> None:
    """Serve until SIGINT or SIGTERM; running requests get ten seconds to end.

    Args:
        host: address to listen on.
        port: TCP port; 0 takes a free one, which uvicorn prints.
        moderator: the embedded one by default.
        options: passed to :func:`create_app`.

    Raises:
        ConfigurationError: the port is out of range, an option is unusable, or the moderator has no key.
    """
    if not 0 <= port <= 65_535:
        raise ConfigurationError(f"port must lie in [0, 65535], not {port}")
    if moderator is None:
        from tta_middleware.moderation.embedded import EmbeddedModerator

        moderator = EmbeddedModerator()
    app = create_app(moderator, **options)
    # uvicorn would tell of it with a traceback and an exit code of its own.
    anyio.run(load, moderator)
    uvicorn.run(
        app,
        host=host,
        port=port,
        access_log=False,
        ws="none",  # uvicorn would log the address of one that is refused with its query, which may hold a key
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )


@dataclass(frozen=True, slots=True)
class Moderations:
    """Answers the bodies of ``POST /v1/moderations``.

    Attributes:
        model_name: reported where a request names no model.
        max_inputs: longer lists are refused.
    """

    moderator: Moderator
    model_name: str
    max_inputs: int = MAX_INPUTS

    async def create(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        """What is answered.

        Raises:
            ApiError: the request cannot be read, or the moderator gave no verdict.
        """
        texts = _texts(payload.get("input"), self.max_inputs)
        model = payload.get("model") or self.model_name
        if not isinstance(model, str):
            raise ApiError(400, "'model' must be a string", param="model")
        verdicts = await scored(self.moderator, texts)
        results = [result_of(verdict, self.moderator.default_threshold) for verdict in verdicts]
        return {"id": f"modr-{uuid.uuid4().hex}", "model": encodable(model), "results": results}


@dataclass(frozen=True, slots=True)
class _Endpoint:
    """The handlers with their settings."""

    moderations_of: Moderations
    max_body_bytes: int
    api_key: str | None

    async def health(self, _: Request) -> JSONResponse:
        return JSONResponse({"status": "ok", "model": self.moderations_of.model_name})

    async def moderations(self, request: Request) -> JSONResponse:
        self._authorise(request.headers)
        payload = json_object(await read_body(request, self.max_body_bytes))
        try:
            return JSONResponse(await self.moderations_of.create(payload))
        except ApiError:
            raise
        except Exception as error:  # noqa: BLE001 - uvicorn would print its message, which may quote the text
            _logger.error("moderator %r failed: %s", self.moderations_of.moderator.name, type(error).__name__)
        raise _failed()

    def _authorise(self, headers: Mapping[str, str]) -> None:
        if self.api_key is None:
            return
        given = bearer(headers)
        if not hmac.compare_digest(given, self.api_key.encode()):
            raise wrong_key(given)


async def scored(moderator: Moderator, texts: Sequence[str]) -> list[Verdict]:
    """One verdict per text; telemetry hears of the request.

    Raises:
        ApiError: there is none; says whose fault that is.
    """
    policy = Policy(threshold=moderator.default_threshold)
    try:
        with observer().checking_alone(moderator.name, "text") as check:
            verdicts = await verdicts_on(moderator, texts)
            for verdict in verdicts:
                check.scored(verdict, policy)
            return verdicts
    except ModerationRejectedError as error:
        raise refused(error, "input") or _failed() from error
    except ModerationUnavailableError as error:
        raise ApiError(503, "the moderator cannot be reached; try again", kind="server_error") from error
    except (ModerationError, ConfigurationError) as error:
        raise _failed() from error


def refused(error: ModerationRejectedError, param: str) -> ApiError | None:
    """The answer where a moderator refused a text, such as one of no length that it takes; None where it refuses us."""
    return None if error.of_setup else ApiError(400, str(error), param=param)


def _failed() -> ApiError:
    return ApiError(500, "the moderator failed; see its configuration", kind="server_error")


def _texts(value: object, limit: int) -> list[str]:
    """The texts of ``input``: a string, strings, or ``{"type": "text", "text": ...}`` objects."""
    if value is None:
        raise ApiError(400, "Missing required parameter: 'input'", code="missing_required_parameter", param="input")
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ApiError(400, "'input' must be a string or a list that is not empty", param="input")
    if len(value) > limit:
        raise ApiError(400, f"'input' has {len(value)} items; at most {limit} are allowed", param="input")
    if all(isinstance(item, str) for item in value):
        return value
    # A list of objects describes one input, as in OpenAI's API, and gets one result.
    return ["\n".join(_text(item, index) for index, item in enumerate(value))]


def _text(item: object, index: int) -> str:
    where = f"input[{index}]"
    match item:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": "image_url"}:
            raise ApiError(400, "this moderator reads no images", code="unsupported_input", param=where)
    raise ApiError(400, "'input' must hold strings only, or {'type': 'text', 'text': ...} objects only", param=where)


def result_of(verdict: Verdict, threshold: float) -> dict[str, Any]:
    """One entry of ``results``. A category that only this moderator has stands after OpenAI's thirteen."""
    scores = {name: verdict.scores.get(name, 0.0) for name in CATEGORIES} | dict(verdict.scores)
    return {
        "flagged": verdict.flagged,
        "categories": {name: score >= threshold for name, score in scores.items()},
        "category_scores": scores,
        "category_applied_input_types": {name: ["text"] for name in scores},
    }


async def _api_error(_: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, ApiError):
        raise error
    return JSONResponse(error.body, error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    """Unknown paths and methods, in the same shape."""
    status = int(getattr(error, "status_code", 500))
    code = {404: "unknown_url", 405: "method_not_supported"}.get(status)
    message = f"{request.method} {request.url.path} is not served here; POST /v1/moderations is"
    return await _api_error(request, ApiError(status, message, code=code))
