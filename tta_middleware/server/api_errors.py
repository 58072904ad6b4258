"""What clients are told of errors, in the shape of OpenAI's; never with a prompt, an answer or a path."""

from __future__ import annotations

from tta_middleware.errors import (
    ConfigurationError,
    EngineBusyError,
    EngineError,
    MissingExtraError,
    ModelNotFoundError,
    ModerationError,
    ModerationUnavailableError,
)
from tta_middleware.moderation.server import ApiError
from tta_middleware.server.gate import too_many

BUSY_SECONDS = 1


def api_error(error: Exception) -> ApiError:
    """The answer to a request that ended with ``error``."""
    match error:
        case ApiError():
            return error
        case EngineBusyError():
            return too_many("the model's queue is full", BUSY_SECONDS)
        case ConfigurationError():
            return ApiError(400, str(error))
        case ModelNotFoundError() | MissingExtraError():
            return _at_fault(503, "the model is not available on this server", "model_unavailable")
        case ModerationUnavailableError():
            return _at_fault(503, "the moderator cannot be reached, so nothing was answered; try again", "unchecked")
        case ModerationError():
            return _at_fault(500, "the moderator gave no verdict, so nothing was answered", "unchecked")
        case EngineError():
            return _at_fault(500, "the model failed while it answered; try again", "engine_error")
    return _at_fault(500, "the server failed; try again", "internal_error")


def too_late(seconds: float) -> ApiError:
    """The answer to a request that met its deadline."""
    return _at_fault(504, f"the answer was not done within {seconds:g} s", "deadline_exceeded")


def _at_fault(status: int, message: str, code: str) -> ApiError:
    return ApiError(status, message, kind="server_error", code=code)
