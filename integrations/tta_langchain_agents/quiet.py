"""Calls whose raw output nobody hears of: no callback, no event stream, no tracer.

Beside the names that :mod:`tta_middleware.chat_model.quiet` takes, one here is no part of a public interface, and there
is none that does the same: LangGraph has none of the variable by which a running tool streams its output
(``_tool_call_writer``). ``AgentMiddleware.transformers`` and ``internal_call_metadata`` hide calls from one kind of
stream only; callbacks and tracers hear them all the same. A test says which name is missing, should one go.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, aclosing, contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import anyio
from anyio.to_thread import run_sync
from langchain_core.runnables import RunnableConfig, ensure_config
from langgraph.pregel._tools import _tool_call_writer
from langsmith.run_helpers import get_tracing_context, tracing_context

from tta_middleware.aio.streams import Send, owned
from tta_middleware.chat_model.quiet import quiet as within_a_guard
from tta_middleware.chat_model.quiet import set_within, unheard

T = TypeVar("T")

_END = object()


def quiet() -> AbstractContextManager[None]:
    """A model or a tool is called inside; see :func:`tta_middleware.chat_model.quiet.quiet`.

    A tool stays a part of its graph, since it may ask a person and go on later.
    """
    return within_a_guard(unheard, [_tool_call_writer])


_around: ContextVar[dict[str, Any] | None] = ContextVar("tracing_around_other_middleware", default=None)
"""LangSmith's settings outside of :func:`unspanned`; set there, read by :func:`spanned` further in."""


@contextmanager
def unspanned() -> Iterator[None]:
    """Other middleware is called inside: its hooks' spans, in which LangSmith has what they give back, are not opened.

    ``create_agent`` opens them by ``traceable`` around every middleware. Guarded models and tools have theirs as ever;
    see :func:`spanned`.
    """
    with ExitStack() as stack:
        set_within(stack, _around, get_tracing_context())
        stack.enter_context(tracing_context(enabled=False))
        yield


@contextmanager
def spanned() -> Iterator[None]:
    """A guarded model or tool is called inside: it is traced as if no other middleware stood around it."""
    around = _around.get()
    with ExitStack() as stack:
        if around is not None:
            set_within(stack, _around, None)
            stack.enter_context(tracing_context(**around))
        yield


def without_callbacks(config: RunnableConfig | None = None) -> RunnableConfig:
    """The config of a quiet call; settings that are not about who hears of it stay."""
    return unheard(ensure_config(config))


def quiet_stream(start: Callable[[], AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """An async stream that runs quietly in a task of its own."""

    async def produce(send: Send[T]) -> None:
        with quiet():
            async with aclosing(start()) as items:
                async for item in items:
                    await send(item)

    return owned(produce)


def quiet_threaded_stream(start: Callable[[], Iterator[T]]) -> AsyncGenerator[T, None]:
    """A sync stream that runs quietly, a step at a time, in worker threads."""

    async def produce(send: Send[T]) -> None:
        with quiet():
            items = start()
            try:
                while (item := await run_sync(next, items, _END)) is not _END:
                    await send(item)  # type: ignore[arg-type]
            finally:
                with anyio.CancelScope(shield=True):
                    await run_sync(getattr(items, "close", _nothing))

    return owned(produce)


def _nothing() -> None:
    """An iterator that is no generator needs no closing."""
