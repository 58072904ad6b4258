"""Calls whose raw output nobody hears of: no callback, no event stream, no tracer."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import ExitStack, aclosing, contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import anyio
from anyio.to_thread import run_sync
from langchain_core.runnables import RunnableConfig, ensure_config
from langchain_core.runnables.config import var_child_runnable_config
from langchain_core.tracers.context import _configure_hooks, tracing_v2_callback_var
from langgraph.pregel._tools import _tool_call_writer
from langsmith.run_helpers import tracing_context

from tta_middleware._streams import Send, owned

T = TypeVar("T")

_END = object()


@contextmanager
def quiet() -> Iterator[None]:
    """What is called inside inherits no callback, whether by config, by context variable, or by tracing settings.

    An empty list of callbacks in the call's config does not suffice: LangChain adds those of the context variables
    (``collect_runs``, ``get_usage_metadata_callback``, ``tracing_v2_enabled``) and LangSmith's to every call.
    """
    ambient = var_child_runnable_config.get() or {}
    silent = RunnableConfig(**{**ambient, "callbacks": []})
    with ExitStack() as stack:
        _set(stack, var_child_runnable_config, silent)
        observers: list[ContextVar[Any]] = [tracing_v2_callback_var, _tool_call_writer]
        for variable in [*observers, *(hook[0] for hook in _configure_hooks)]:
            _set(stack, variable, None)
        stack.enter_context(tracing_context(enabled=False))
        yield


def _set(stack: ExitStack, variable: ContextVar[Any], value: Any) -> None:
    stack.callback(variable.reset, variable.set(value))


def without_callbacks(config: RunnableConfig | None = None) -> RunnableConfig:
    """The config of a quiet call; settings that are not about callbacks stay."""
    return RunnableConfig(**{**ensure_config(config), "callbacks": []})


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
