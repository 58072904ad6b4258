"""The application in a process of its own, under uvicorn."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette

from tta_middleware.errors import ConfigurationError
from tta_middleware.moderation.server import KEEP_ALIVE_SECONDS
from tta_middleware.server.draining import Drain
from tta_middleware.server.settings import ServerSettings

if TYPE_CHECKING:
    import socket

    import uvicorn

LAST_WORDS_SECONDS = 2
"""How long what is told to end has for that; then uvicorn cancels it, and nobody hears why."""

LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"json": {"()": "tta_middleware.server.request_log.JsonLines"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json"}},
    "loggers": {
        name: {"handlers": ["stderr"], "level": "INFO", "propagate": False} for name in ("uvicorn", "tta_middleware")
    },
}
"""Everything as JSON lines on stderr."""


def serve(app: Starlette, settings: ServerSettings, *, host: str = "127.0.0.1", port: int = 8080) -> None:
    """Serve until SIGINT or SIGTERM; requests under way get ``drain_seconds`` to end, new ones are not taken.

    One that is not done by then ends with an error that says so, as one that met its deadline does.

    Args:
        host: address to listen on. The server speaks plain HTTP: put a TLS proxy in front of it where the network is
            not trusted.
        port: TCP port; 0 takes a free one, which the log tells.

    Raises:
        ConfigurationError: the port is out of range, or cannot be listened on.
        TTAError: a model cannot be loaded.
    """
    import uvicorn

    if not 0 <= port <= 65_535:
        raise ConfigurationError(f"port must lie in [0, 65535], not {port}")
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        access_log=False,
        log_config=LOGGING,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=settings.limits.drain_seconds + LAST_WORDS_SECONDS,
    )
    server = uvicorn.Server(config)
    _drains(server, app.state.drain, settings.limits.drain_seconds)
    try:
        with suppress(KeyboardInterrupt):
            server.run()
    except SystemExit:
        raise getattr(app.state, "startup_error", None) or ConfigurationError(
            f"cannot serve on {host}:{port}; the log says why"
        ) from None


def _drains(server: uvicorn.Server, drain: Drain, seconds: float) -> None:
    """Have requests under way told when the server begins to stop."""
    shutdown = server.shutdown

    async def draining(sockets: list[socket.socket] | None = None) -> None:
        drain.begin(seconds)
        await shutdown(sockets)

    server.shutdown = draining  # type: ignore[method-assign]
