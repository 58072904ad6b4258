"""An ASGI application on a real loopback port, in a thread of this process: for clients that speak HTTP."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import uvicorn

STARTED = 30.0
STOPPED = 30.0


@dataclass(frozen=True)
class Loopback:
    """A running server: where it listens, and uvicorn's own object."""

    url: str
    server: uvicorn.Server


@contextmanager
def on_loopback(app: Any, *, backlog: int = 1024, **config: Any) -> Iterator[Loopback]:
    """Serve an application until the block ends.

    Args:
        app: any ASGI application; its lifespan runs.
        backlog: connections that may wait to be accepted.
        config: settings of ``uvicorn.Config``.

    Raises:
        RuntimeError: the application did not start.
    """
    import uvicorn

    listener = socket.create_server(("127.0.0.1", 0), backlog=backlog)
    server = uvicorn.Server(uvicorn.Config(app, **{"log_level": "warning", "lifespan": "on", **config}))
    started = threading.Event()
    startup = server.startup

    async def announced(sockets: list[socket.socket] | None = None) -> None:
        await startup(sockets)
        started.set()

    server.startup = announced  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        if not started.wait(STARTED):
            raise RuntimeError("the application did not start; its lifespan failed or hangs")
        yield Loopback(f"http://127.0.0.1:{listener.getsockname()[1]}", server)
    finally:
        server.should_exit = True
        thread.join(STOPPED)
        listener.close()
