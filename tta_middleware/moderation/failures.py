"""What a failed HTTP request means: retry later, or tell the user what to change.

Messages carry the status and the API's error code, never the body: servers echo the text they refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from tta_middleware.errors import ModerationError, ModerationRejectedError, ModerationUnavailableError

if TYPE_CHECKING:
    import openai

_RETRYABLE_STATUSES = frozenset({408, 409, 429})
_CODE = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
_HINTS = {
    400: "check the model name and the length of the texts",
    401: "the API key was not accepted; check {key_variable} or api_key=",
    403: "the API key may not use this endpoint; check the project's permissions and the region",
    404: "no such endpoint or model; check base_url and model",
    413: "the request is too large; lower max_texts or max_characters",
    422: "the server does not understand the request; check that it speaks this API",
}


def from_openai(error: openai.APIError, *, where: str, key_variable: str) -> ModerationError:
    """Our error for one that the openai client raised; ``where`` names the server."""
    import openai

    if isinstance(error, openai.APIStatusError):
        code = error_code(error)
        return from_status(error.status_code, error.response.headers, code=code, where=where, key_variable=key_variable)
    if isinstance(error, openai.APITimeoutError):
        return ModerationUnavailableError(f"{where} did not answer in time", cause="timeout")
    return ModerationUnavailableError(
        f"no usable connection to {where}; check the network and base_url", cause="connection"
    )


def error_code(error: openai.APIError) -> str:
    """The API's own code of an error, where it looks like one; what servers write there may be a sentence."""
    code = error.code or getattr(error, "type", None)
    return code if isinstance(code, str) and _CODE.fullmatch(code) else ""


def from_status(
    status: int, headers: Mapping[str, str], *, code: object, where: str, key_variable: str
) -> ModerationError:
    """The error for an HTTP status other than 2xx."""
    known = isinstance(code, str) and _CODE.fullmatch(code)
    said = f"{where} answered {status}" + (f" ({code})" if known else "")
    if code == "insufficient_quota":
        return ModerationRejectedError(f"{said}: the account has no quota left; retrying cannot help", status=status)
    if status in _RETRYABLE_STATUSES or status >= 500:
        cause = "rate_limit" if status == 429 else "status"
        wait = retry_after(headers, datetime.now(UTC))
        said += "" if wait is None else f" and asked to wait {wait:g} s"
        return ModerationUnavailableError(said, cause=cause, retry_after=wait)
    usual = (
        "redirects are not followed; check base_url" if status < 400 else "check base_url and the request's settings"
    )
    hint = _HINTS.get(status, usual).format(key_variable=key_variable)
    return ModerationRejectedError(f"{said}: {hint}", status=status)


def retry_after(headers: Mapping[str, str], now: datetime) -> float | None:
    """Seconds to wait by ``retry-after-ms`` or ``Retry-After`` (seconds or HTTP date, RFC 9110); None without."""
    milliseconds = _seconds(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000.0
    value = headers.get("retry-after")
    seconds = _seconds(value)
    return seconds if seconds is not None else _until(value, now)


def _seconds(value: str | None) -> float | None:
    try:
        seconds = float(value or "")
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0.0 else None


def _until(value: str | None, now: datetime) -> float | None:
    try:
        moment = parsedate_to_datetime(value or "")
    except (ValueError, IndexError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - now).total_seconds())
