"""Spans and metrics of guarded answers by OpenTelemetry's conventions (extra ``otel``); docs/telemetry.md.

Nothing is told unless somebody asks: a program with :func:`instrument`, a server with its setting ``telemetry``.
Where it goes is OpenTelemetry's own affair. Every import of OpenTelemetry is in ``telemetry.otel``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tta_middleware.errors import MissingExtraError
from tta_middleware.observing import observe_everywhere
from tta_middleware.telemetry.format import FORMAT_VERSION
from tta_middleware.telemetry.settings import TelemetrySettings

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider

    from tta_middleware.telemetry.otel import ServerTelemetry

__all__ = ["FORMAT_VERSION", "TelemetrySettings", "instrument", "server_telemetry", "uninstrument"]

_HINT = "telemetry needs OpenTelemetry; run: pip install 'tta-middleware[otel]'"


def instrument(
    *,
    capture_content: bool = False,
    tracer_provider: TracerProvider | None = None,
    meter_provider: MeterProvider | None = None,
) -> None:
    """Tell of every answer of this process from now on, but of those of a server with telemetry of its own.

    Args:
        capture_content: spans hold the conversation and the text that left, too.
        tracer_provider: OpenTelemetry's global one by default, and likewise ``meter_provider``.

    Raises:
        MissingExtraError: OpenTelemetry is not installed.
    """
    try:
        from tta_middleware.telemetry.otel import Telemetry
    except ModuleNotFoundError:
        raise MissingExtraError(_HINT) from None
    meters = [meter_provider] if meter_provider else None
    observe_everywhere(Telemetry(capture_content=capture_content, tracer_provider=tracer_provider, meters=meters))


def uninstrument() -> None:
    """Tell of no further answer; without :func:`instrument` before it nothing changes."""
    observe_everywhere(None)


def server_telemetry(settings: TelemetrySettings) -> ServerTelemetry:
    """The telemetry of one server: OpenTelemetry's global providers, and a page for Prometheus.

    Raises:
        MissingExtraError: OpenTelemetry or its exporter for Prometheus is not installed.
    """
    try:
        from tta_middleware.telemetry.otel import ServerTelemetry
    except ModuleNotFoundError:
        raise MissingExtraError(_HINT) from None
    return ServerTelemetry(settings)
