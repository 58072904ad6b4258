"""What telemetry a server gives."""

from __future__ import annotations

from tta_middleware.config import Settings


class TelemetrySettings(Settings):
    """A server's telemetry; without these settings there is none.

    Attributes:
        metrics_open: ``GET /metrics`` takes no key, where others need one.
        capture_content: spans hold the conversation and the text that left. Off, nothing of either is in any of it.
    """

    metrics_open: bool = False
    capture_content: bool = False
