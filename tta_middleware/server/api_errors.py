"""What clients are told of errors, in the shape of OpenAI's; never with a prompt, an answer or a path."""

from __future__ import annotations

import math

from tta_middleware.errors import (
    ConfigurationError,
    ContextLengthError,
    EngineBusyError,
    EngineError,
    MissingExtraError,
    ModelNotFoundError,
    ModerationError,
    ModerationUnavailableError,
    ModeratorSetupError,
    UpstreamError,
)
from tta_middleware.http_api import ApiError
from tta_middleware.server.gate import too_many

BUSY_SECONDS = 1


def api_error(error: Exception) -> ApiError:
    """The answer to a request that ended with ``error``."""
    match error:
        case ApiError():
            return error
        case EngineBusyError():
            return too_many("the model's queue is full", BUSY_SECONDS)
        case UpstreamError():
            return _of_upstream(error)
        case ModeratorSetupError():
            message = "the moderator is not set up, so nothing was answered; the server's operator has to mend that"
            return _at_fault(500, message, "moderator_setup")
        case ContextLengthError():
            return ApiError(400, str(error), code="context_length_exceeded")
        case ConfigurationError():
            return ApiError(400, str(error))
        case ModelNotFoundError() | MissingExtraError():
            return unavailable()
        case ModerationUnavailableError():
            return _at_fault(503, "the moderator cannot be reached, so nothing was answered; try again", "unchecked")
        case ModerationError():
            return _at_fault(500, "the moderator gave no verdict, so nothing was answered", "unchecked")
        case EngineError():
            return _at_fault(500, "the model failed while it answered; try again", "engine_error")
    return _at_fault(500, "the server failed; try again", "internal_error")


_OURS = frozenset({401, 402, 403, 404, 405})
"""Statuses with which an upstream refuses this server's key, address or model, which no client can mend."""


def _of_upstream(error: UpstreamError) -> ApiError:
    """What a client is told of an upstream; nothing of what that said but a code."""
    code = error.code or "upstream_error"
    match error.cause:
        case "rate_limit":
            return too_many("the upstream is busy", math.ceil(error.retry_after or BUSY_SECONDS))
        case "timeout":
            return _at_fault(504, "the upstream did not answer in time; try again", "upstream_timeout")
        case "connection":
            return _at_fault(502, "the upstream cannot be reached, or broke off; try again", "upstream_unreachable")
        case "refused" if error.status is not None and error.status >= 400 and error.status not in (*_OURS, 429):
            return ApiError(400, f"the upstream refused the request with status {error.status}", code=code)
        case "refused":
            return _at_fault(502, "the upstream refuses this server; its operator has to mend that", "upstream_refused")
        case "status":
            return _at_fault(502, f"the upstream failed with status {error.status}; try again", "upstream_failed")
    return _at_fault(502, "the upstream's answer broke off or cannot be read; try again", "upstream_broken")


def unavailable() -> ApiError:
    """The answer where a model cannot be loaded."""
    return _at_fault(503, "the model is not available on this server", "model_unavailable")


def too_late(seconds: float) -> ApiError:
    """The answer to a request that met its deadline."""
    return _at_fault(504, f"the answer was not done within {seconds:g} s", "deadline_exceeded")


def stopping() -> ApiError:
    """The answer to a request that was not done when the server's time to stop was up."""
    message = f"the server is stopping; try again in {BUSY_SECONDS} s"
    headers = {"retry-after": str(BUSY_SECONDS)}
    return ApiError(503, message, kind="server_error", code="server_stopping", headers=headers)


def _at_fault(status: int, message: str, code: str) -> ApiError:
    return ApiError(status, message, kind="server_error", code=code)
