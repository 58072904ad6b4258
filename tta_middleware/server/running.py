"""The application in a process of its own, under uvicorn."""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tta_middleware.errors import ConfigurationError
from tta_middleware.http_api import KEEP_ALIVE_SECONDS
from tta_middleware.server.draining import Drain
from tta_middleware.server.settings import ServerSettings

if TYPE_CHECKING:
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
        ConfigurationError: the port is out of range, or cannot be listened on, which shows before a model is loaded.
        TTAError: a model cannot be loaded, or a moderator cannot be asked as it is set up.
    """
    import uvicorn

    if not 0 <= port <= 65_535:
        raise ConfigurationError(f"port must lie in [0, 65535], not {port}")
    _refuse_taken(host, port)
    config = uvicorn.Config(
        _told_once(app),
        host=host,
        port=port,
        access_log=False,
        log_config=LOGGING,
        server_header=False,
        ws="none",  # uvicorn would log the address of one that is refused with its query, which may hold a key
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


def _refuse_taken(host: str, port: int) -> None:
    """Raises ConfigurationError where nothing can listen; uvicorn looks only after the models are loaded."""
    try:
        addresses = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in addresses:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
    except OSError as error:
        raise ConfigurationError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; give another --host or --port"
        ) from None


def _told_once(app: ASGIApp) -> ASGIApp:
    """Without the traceback that the log would have of a start that failed: whoever started it gets the error."""

    async def quiet(scope: Scope, receive: Receive, send: Send) -> None:
        async def tell(message: Message) -> None:
            failed = message["type"] == "lifespan.startup.failed"
            await send({"type": message["type"]} if failed else message)

        await app(scope, receive, tell if scope["type"] == "lifespan" else send)

    return quiet


def _drains(server: uvicorn.Server, drain: Drain, seconds: float) -> None:
    """Have requests under way told when the server begins to stop."""
    shutdown = server.shutdown

    async def draining(sockets: list[socket.socket] | None = None) -> None:
        drain.begin(seconds)
        await shutdown(sockets)

    server.shutdown = draining  # type: ignore[method-assign]
