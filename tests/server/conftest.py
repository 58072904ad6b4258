"""A real server on a loopback port, in a thread of this process."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import uvicorn

from tta_middleware.moderation.embedded import EmbeddedModerator
from tta_middleware.moderation.server import KEEP_ALIVE_SECONDS, create_app


@contextmanager
def running(**options: object) -> Iterator[str]:
    """The base URL of a server that stops when the block ends."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    app = create_app(EmbeddedModerator(), **options)  # type: ignore[arg-type]
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="warning", lifespan="on", timeout_keep_alive=KEEP_ALIVE_SECONDS)
    )
    started = threading.Event()
    startup = server.startup

    async def announced(sockets: list[socket.socket] | None = None) -> None:
        await startup(sockets)
        started.set()

    server.startup = announced  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        assert started.wait(30)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """Base URL of a server with default settings."""
    with running() as base:
        yield base


@pytest.fixture
def serving() -> Callable[..., object]:
    """Starts a server with other settings: ``with serving(api_key=...) as url``."""
    return running
