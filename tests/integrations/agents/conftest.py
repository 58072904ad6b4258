"""Everything that an agent lets out, in one place, to be searched for text that must not leave."""

from __future__ import annotations

import pickle
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import BaseMessage
from langchain_core.tracers.base import BaseTracer
from langgraph.checkpoint.memory import InMemorySaver
from tta_langchain_agents.testing import ScriptedChatModel

from tta_middleware.aio import bridge
from tta_middleware.testing.delays import slowly

MARK = "flagme"


class Listener(BaseCallbackHandler):
    """Writes down whatever a callback is told."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_"):
            heard = self.heard
            return lambda *args, **kwargs: heard.append(f"{name} {args!r} {kwargs!r}")
        return super().__getattribute__(name)


class Tracer(BaseTracer):
    """Keeps the finished runs."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[str] = []

    def _persist_run(self, run: Any) -> None:
        self.runs.append(repr(run.model_dump()))


@dataclass
class Watched:
    """An agent with a checkpointer, and everything that it let out."""

    agent: Any
    model: ScriptedChatModel
    saver: InMemorySaver
    listener: Listener = field(default_factory=Listener)
    tracer: Tracer = field(default_factory=Tracer)
    seen: list[Any] = field(default_factory=list)
    slow: bool = False
    """Whether the consumer of a stream is slower than the moderator."""

    @property
    def config(self) -> dict[str, Any]:
        return {"configurable": {"thread_id": "one"}, "callbacks": [self.listener, self.tracer]}

    @property
    def messages(self) -> list[BaseMessage]:
        """The conversation as the state has it."""
        found: list[BaseMessage] = self.agent.get_state(self.config).values["messages"]
        return found

    def let_out(self) -> bytes:
        """What was seen, heard, traced and stored."""
        stored = pickle.dumps((dict(self.saver.blobs), dict(self.saver.writes), _plain(self.saver.storage)))
        told = [*map(repr, self.seen), *self.listener.heard, *self.tracer.runs, _joined(self.seen)]
        assert self.listener.heard
        assert self.tracer.runs
        return stored + "\n".join(told).encode()

    def leaks(self, mark: str = MARK) -> bool:
        return mark.encode() in self.let_out()


def _plain(storage: Any) -> Any:
    return {key: _plain(value) for key, value in storage.items()} if hasattr(storage, "items") else storage


def _joined(seen: list[Any]) -> str:
    """Text that was seen in pieces, as a reader reads it; with several stream modes each item names its mode."""
    pieces = [item[1] if isinstance(item, tuple) and item[0] == "messages" else item for item in seen]
    return "".join(piece[0].text for piece in pieces if isinstance(piece, tuple) and isinstance(piece[0], BaseMessage))


Build = Callable[..., Watched]


@pytest.fixture
def watched() -> Build:
    def build(
        answers: list[Any], *, tools: Any = (), middleware: Any = (), model: Any = None, **options: Any
    ) -> Watched:
        scripted = ScriptedChatModel(answers=answers)
        saver = InMemorySaver()
        agent = create_agent(
            model or scripted, tools=list(tools), middleware=list(middleware), checkpointer=saver, **options
        )
        return Watched(agent, scripted, saver)

    return build


def user(text: str = "hello") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


def sync_invoke(run: Watched, given: Any) -> None:
    run.seen.append(run.agent.invoke(given, run.config))


def sync_stream(run: Watched, given: Any, mode: str) -> None:
    sync_drain(run, run.agent.stream(given, run.config, stream_mode=mode))


def sync_events(run: Watched, given: Any) -> None:
    sync_drain(run, run.agent.stream_events(given, run.config, version="v3"))


def sync_drain(run: Watched, items: Iterable[Any]) -> None:
    for item in items:
        run.seen.append(item)
        if run.slow:
            time.sleep(0.001)  # other threads go on meanwhile; what is found does not depend on how far they get


async def drain(run: Watched, items: AsyncIterator[Any]) -> None:
    async for item in slowly(items) if run.slow else items:
        run.seen.append(item)


async def async_invoke(run: Watched, given: Any) -> None:
    run.seen.append(await run.agent.ainvoke(given, run.config))


async def async_stream(run: Watched, given: Any, mode: str) -> None:
    await drain(run, run.agent.astream(given, run.config, stream_mode=mode))


async def async_events(run: Watched, given: Any, version: str) -> None:
    events = run.agent.astream_events(given, run.config, version=version)
    await drain(run, events if version == "v2" else await events)


async def async_log(run: Watched, given: Any) -> None:
    await drain(run, run.agent.astream_log(given, run.config))


MODES = ("messages", "updates", "values", "custom", "debug", "tools")

SYNC: dict[str, Any] = {
    "invoke": sync_invoke,
    "events-v3": sync_events,
    **{mode: lambda run, given, mode=mode: sync_stream(run, given, mode) for mode in MODES},
}

ASYNC: dict[str, Any] = {
    "ainvoke": async_invoke,
    "astream_log": async_log,
    "events-v2": lambda run, given: async_events(run, given, "v2"),
    "events-v3": lambda run, given: async_events(run, given, "v3"),
    **{mode: lambda run, given, mode=mode: async_stream(run, given, mode) for mode in MODES},
}


# The quick run has every mode that gives messages, and each kind of call; the slow one the rest. astream_log is
# deprecated and takes as long as three others; tests/langchain/test_surfaces.py has it.
SELDOM = {
    "sync updates", "sync values", "sync custom", "sync debug", "sync tools", "custom", "debug", "tools", "astream_log",
}  # fmt: skip
SURFACES = [f"sync {name}" for name in SYNC] + [f"async {name}" for name in ASYNC]


def _seldom(name: str) -> bool:
    return name in SELDOM or name.removeprefix("async ") in SELDOM


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] * _seldom(name)) for name in SURFACES])
def surface(request: pytest.FixtureRequest) -> Callable[[Watched, Any], Any]:
    """One way to run an agent; a coroutine function for all of them."""
    kind, name = request.param.split(" ")

    async def use(run: Watched, given: Any) -> None:
        import asyncio

        if kind == "async":
            await ASYNC[name](run, given)
        else:
            await asyncio.to_thread(SYNC[name], run, given)

    return use


@pytest.fixture(scope="session", autouse=True)
def _no_bridge_is_left() -> Iterator[None]:
    yield
    bridge.shutdown()
