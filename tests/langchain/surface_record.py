"""Everything that a LangChain user can get hold of during a call, kept as plain strings."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.runnables import Runnable
from langchain_core.tracers.base import BaseTracer
from langchain_core.tracers.schemas import Run

_EVENTS = (
    "on_chat_model_start", "on_llm_new_token", "on_llm_end", "on_llm_error", "on_stream_event", "on_custom_event",
    "on_chain_start", "on_chain_end", "on_chain_error", "on_tool_start", "on_tool_end", "on_retry",
)  # fmt: skip


def spelt(thing: Any) -> str:
    """All text in an object: its fields' and items', a traceback's, that of bytes."""
    return "\n".join(_pieces(thing, set()))


def _pieces(thing: Any, seen: set[int]) -> Iterator[str]:
    match thing:
        case None | bool() | int() | float():
            return
        case str():
            yield thing
            return
        case bytes() | bytearray():
            yield thing.decode(errors="ignore")
            return
    if id(thing) in seen or isinstance(thing, Runnable | BaseCallbackHandler | type) or callable(thing):
        return
    seen.add(id(thing))
    if isinstance(thing, BaseException):
        yield from traceback.format_exception(thing)
        yield repr(thing)
    for part in _parts(thing):
        yield from _pieces(part, seen)


def _parts(thing: Any) -> Iterator[Any]:
    if isinstance(thing, Mapping):
        for key, value in list(thing.items()):
            yield key
            yield value
    elif isinstance(thing, list | tuple | Set) or type(thing).__name__ == "deque":
        yield from list(thing)
    else:
        yield repr(thing)
        yield from list(getattr(thing, "__dict__", {}).values())
        yield from (getattr(thing, name, None) for name in getattr(type(thing), "__slots__", ()))


@dataclass
class Record:
    """What was seen in one cell, by place."""

    seen: dict[str, list[str]] = field(default_factory=dict)
    custom: list[str] = field(default_factory=list)

    def note(self, place: str, thing: Any) -> None:
        """At once, since LangChain goes on to change some of its objects."""
        self.seen.setdefault(place, []).append(spelt(thing))

    def item(self, thing: Any) -> None:
        """Something that the consumer was given."""
        self.note("consumer", thing)

    def custom_event(self, name: str) -> None:
        self.custom.append(name)

    def places(self, hit: Callable[[str], set[str]]) -> dict[str, set[str]]:
        """What ``hit`` finds, by place; only where it finds something."""
        found = {place: hit("\n".join(texts)) for place, texts in self.seen.items()}
        return {place: words for place, words in found.items() if words}

    @property
    def consumer(self) -> str:
        return "\n".join(self.seen.get("consumer", []))


class Handler(BaseCallbackHandler):
    """A sync handler that keeps every call."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def __getattribute__(self, name: str) -> Any:
        if name not in _EVENTS:
            return super().__getattribute__(name)
        record = super().__getattribute__("record")

        def keep(*args: Any, **kwargs: Any) -> None:
            record.note(f"callback {name}", (args, kwargs))
            if name == "on_custom_event":
                record.custom_event(args[0])

        return keep


class AsyncHandler(AsyncCallbackHandler):
    """The same for async callbacks."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def __getattribute__(self, name: str) -> Any:
        if name not in _EVENTS:
            return super().__getattribute__(name)
        record = super().__getattribute__("record")

        async def keep(*args: Any, **kwargs: Any) -> None:
            record.note(f"async callback {name}", (args, kwargs))

        return keep


class Tracer(BaseTracer):
    """Keeps the runs that a tracing service would be sent, when they begin, change and end."""

    def __init__(self, record: Record) -> None:
        super().__init__(_schema_format="original+chat")
        self.record = record
        self.runs: list[Run] = []

    def _persist_run(self, run: Run) -> None:
        self.record.note("tracer", run)

    def _on_run_create(self, run: Run) -> None:
        self.runs.append(run)

    def _on_run_update(self, run: Run) -> None:
        self.record.note("tracer", run)


class LogHandler(logging.Handler):
    """All that any package logs, at DEBUG."""

    def __init__(self, record: Record) -> None:
        super().__init__(logging.DEBUG)
        self.record = record

    def emit(self, log: logging.LogRecord) -> None:
        self.record.note("log", (log.getMessage(), log.exc_info and log.exc_info[1]))
        # Of a batch whose consumer has left, LangChain never looks at the other results.
        if log.name == "asyncio" and log.levelno >= logging.WARNING and "abatch_as_completed" not in log.getMessage():
            self.record.note("asyncio complains", log.getMessage())
