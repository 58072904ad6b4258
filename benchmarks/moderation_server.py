"""The loopback fault server in a process of its own, so that it does not share the client's interpreter."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Self

from tta_middleware.testing.fault_server import FaultServer
from tta_middleware.testing.faults import Plan


class ServerProcess:
    """``with`` starts it; ``texts()`` gives the texts of each request so far, ``connections()`` the open sockets."""

    def __init__(self, make_plan: Callable[..., Plan], *arguments: Any) -> None:
        here, there = multiprocessing.Pipe()
        self._pipe = here
        self._process = multiprocessing.get_context("spawn").Process(
            target=_serve, args=(there, make_plan, arguments), daemon=True
        )

    def __enter__(self) -> Self:
        self._process.start()
        self.base_url: str = self._pipe.recv()
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.send("stop")
        self._process.join(10)

    def texts(self) -> list[list[str]]:
        return self._ask("texts")

    def connections(self) -> int:
        return self._ask("connections")

    def _ask(self, what: str) -> Any:
        self._pipe.send(what)
        return self._pipe.recv()


def _serve(pipe: Connection, make_plan: Callable[..., Plan], arguments: tuple[Any, ...]) -> None:
    asyncio.run(_main(pipe, make_plan(*arguments)))


async def _main(pipe: Connection, plan: Plan) -> None:
    async with FaultServer(plan) as server:
        pipe.send(server.base_url)
        while (question := await asyncio.to_thread(pipe.recv)) != "stop":
            answer = server.connections if question == "connections" else [r.texts for r in server.requests]
            pipe.send(answer)
