"""What the HTTP servers here share: errors in OpenAI's shape, bodies and keys as they come in (extra ``server``)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from tta_middleware.errors import MissingExtraError

try:
    from starlette.requests import ClientDisconnect, Request
except ImportError as missing:
    raise MissingExtraError("the server needs the extra: pip install 'tta-middleware[server]'") from missing

KEEP_ALIVE_SECONDS = 75
"""Longer than clients keep idle connections, so that no request is sent into a connection that is closing."""


class ApiError(Exception):
    """An answer in the shape of OpenAI's error bodies.

    Args:
        status: HTTP status code.
        message: what happened and what to do.
        kind: OpenAI's error ``type``.
        code: OpenAI's error ``code``.
        param: the field of the request that is at fault.
        headers: beside the body, such as ``Retry-After``.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def bearer(headers: Mapping[str, str]) -> bytes:
    """The key after ``Authorization: Bearer``, the bytes that came; empty where there is none."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    # Blanks alone: the last byte of a letter such as "à" is a space by itself.
    return given.strip(" \t").encode("latin-1") if scheme.lower() == "bearer" else b""


def wrong_key(given: bytes) -> ApiError:
    """The answer to a key that is not known, or to none."""
    said = "Incorrect API key provided" if given else "No API key provided; send it as 'Authorization: Bearer KEY'"
    return ApiError(401, said, code="invalid_api_key")


async def read_body(request: Request, limit: int) -> bytes:
    """The body, read no further than ``limit`` bytes, whatever Content-Length promises; not at all if that is more.

    Raises:
        ApiError: it is longer, or the connection closed before its end.
    """
    large = ApiError(413, f"the body is larger than {limit} bytes; send less text", code="too_large")
    promised = request.headers.get("content-length", "")
    if promised.isdecimal() and int(promised) > limit:
        raise large
    chunks = bytearray()
    try:
        async for chunk in request.stream():
            chunks += chunk
            if len(chunks) > limit:
                raise large
    except ClientDisconnect:
        raise ApiError(400, "the connection closed before the body was complete") from None
    return bytes(chunks)


def json_object(body: bytes) -> Mapping[str, Any]:
    """The object that a body holds.

    Raises:
        ApiError: it holds none.
    """
    try:
        payload = json.loads(body, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not valid JSON") from None
    if not isinstance(payload, dict):
        raise ApiError(400, "the body must be a JSON object")
    return payload


def _finite(number: str) -> float:
    """JSON has no other numbers, and nobody could write one on."""
    value = float(number)
    if not math.isfinite(value):
        raise ValueError("a number that is none")
    return value
