"""Calls whose raw output nobody hears of: no callback, no event stream, no tracer.

Four names here are no part of a public interface, and there is none that does the same: LangChain has no list of the
context variables that it takes handlers from (``_configure_hooks``, ``tracing_v2_callback_var``), LangGraph none of the
one by which a running tool streams its output (``_tool_call_writer``), and none of the setting by which a graph that a
tool runs streams into the one around it (``CONFIG_KEY_STREAM``). ``AgentMiddleware.transformers`` and
``internal_call_metadata`` hide calls from one kind of stream only; callbacks and tracers hear them all the same. A test
says which name is missing, should one go.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import ExitStack, aclosing, contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import anyio
from anyio.to_thread import run_sync
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.runnables import RunnableConfig, ensure_config
from langchain_core.runnables.config import var_child_runnable_config
from langchain_core.tracers.context import _configure_hooks, tracing_v2_callback_var
from langgraph._internal._constants import CONFIG_KEY_STREAM
from langgraph.pregel._tools import _tool_call_writer
from langgraph.pregel.protocol import StreamProtocol
from langsmith.run_helpers import get_tracing_context, tracing_context

from tta_middleware.aio.streams import Send, owned

T = TypeVar("T")

_END = object()


class _Mute(BaseCallbackHandler):
    """Stands where LangChain would make a handler of its own, and hears nothing."""


@contextmanager
def quiet() -> Iterator[None]:
    """What is called inside inherits no callback, whether by config, by context variable, or by tracing settings.

    An empty list of callbacks in the call's config does not suffice: LangChain adds those of the context variables
    (``collect_runs``, ``get_usage_metadata_callback``, ``tracing_v2_enabled``), those that a setting of the environment
    asks for, and LangSmith's to every call.
    """
    ambient: Any = var_child_runnable_config.get() or {}
    with ExitStack() as stack:
        _set(stack, var_child_runnable_config, _silent(ambient))
        observers: list[ContextVar[Any]] = [tracing_v2_callback_var, _tool_call_writer]
        for variable in observers:
            _set(stack, variable, None)
        for variable, _, handler_class, env_var in _configure_hooks:
            # Where there is none, LangChain would make one if the environment asks for it.
            _set(stack, variable, _Mute() if handler_class and env_var else None)
        stack.enter_context(tracing_context(enabled=False))
        yield


_around: ContextVar[dict[str, Any] | None] = ContextVar("tracing_around_other_middleware", default=None)
"""LangSmith's settings outside of :func:`unspanned`; set there, read by :func:`spanned` further in."""


@contextmanager
def unspanned() -> Iterator[None]:
    """Other middleware is called inside: its hooks' spans, in which LangSmith has what they give back, are not opened.

    ``create_agent`` opens them by ``traceable`` around every middleware. Guarded models and tools have theirs as ever;
    see :func:`spanned`.
    """
    with ExitStack() as stack:
        _set(stack, _around, get_tracing_context())
        stack.enter_context(tracing_context(enabled=False))
        yield


@contextmanager
def spanned() -> Iterator[None]:
    """A guarded model or tool is called inside: it is traced as if no other middleware stood around it."""
    around = _around.get()
    with ExitStack() as stack:
        if around is not None:
            _set(stack, _around, None)
            stack.enter_context(tracing_context(**around))
        yield


def _set(stack: ExitStack, variable: ContextVar[Any], value: Any) -> None:
    stack.callback(variable.reset, variable.set(value))


def without_callbacks(config: RunnableConfig | None = None) -> RunnableConfig:
    """The config of a quiet call; settings that are not about who hears of it stay."""
    return _silent(ensure_config(config))


def _silent(config: RunnableConfig) -> RunnableConfig:
    """A config without callbacks, in which ``subgraphs=True`` of a graph around shows nothing of graphs further in.

    The stream is muted and not taken out: a graph without one would leave out what it writes to ``custom``, too.
    """
    silent = RunnableConfig(**{**config, "callbacks": []})
    settings = config.get("configurable") or {}
    if CONFIG_KEY_STREAM in settings:
        silent["configurable"] = {**settings, CONFIG_KEY_STREAM: StreamProtocol(lambda _: None, set())}
    return silent


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
