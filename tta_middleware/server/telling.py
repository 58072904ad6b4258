"""A server's telemetry at its two places: around every request, and as the page that Prometheus reads."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response

from tta_middleware.server.front import Call, Endpoint, Told
from tta_middleware.server.request_log import Record

if TYPE_CHECKING:
    from tta_middleware.telemetry.otel import ServerTelemetry


def told_by(telemetry: ServerTelemetry, path: str) -> Told:
    """What stands around requests for ``path``, as the server knows it."""

    def told(request: Request, record: Record) -> AbstractContextManager[None]:
        return telemetry.request(record, path, request.url.scheme, request.headers)

    return told


def page_of(telemetry: ServerTelemetry) -> Endpoint:
    """``GET /metrics``."""

    async def page(_: Call) -> Response:
        content, media_type = telemetry.page()
        return Response(content, media_type=media_type)

    return page
