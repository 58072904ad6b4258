"""Calls inside a guard that nobody around it hears of: no callback, no event stream, no tracer, no graph's state.

A moderator, a fallback or an engine may be LangChain's as well. What such a part is told and says is raw, and LangChain
hands callbacks, tracers and LangGraph's streams on to whatever is called inside a run.

Some names here are no part of a public interface, and there is none that does the same: LangChain has no list of the
context variables that it takes handlers from (``_configure_hooks``, ``tracing_v2_callback_var``), and LangGraph has no
names for a run's settings. LangGraph is imported only where it runs already.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import ExitStack, aclosing, contextmanager
from contextvars import ContextVar
from typing import Any, Final, TypeVar
from uuid import uuid4

from langchain_core.callbacks import AsyncCallbackManager, BaseCallbackHandler
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import var_child_runnable_config
from langchain_core.tracers.context import _configure_hooks, tracing_v2_callback_var
from langsmith.run_helpers import tracing_context

T = TypeVar("T")

Config = Callable[[RunnableConfig], RunnableConfig]

_STREAM: Final = "__pregel_stream"
_STORES: Final = frozenset({"__pregel_checkpointer", "checkpoint_id", "checkpoint_map"})
"""Settings by which LangGraph has a graph inside a node stream into the one around, and store what it does there.

The rest stays: a part may ask a person with ``interrupt`` and write to the ``custom`` stream by its own hand.
"""


class _Mute(BaseCallbackHandler):
    """Stands where LangChain would make a handler of its own, and hears nothing."""


def alone(config: RunnableConfig) -> RunnableConfig:
    """A config in which nobody listens, and a graph neither shows nor stores what it does."""
    silent = unheard(config)
    kept = {name: value for name, value in (silent.get("configurable") or {}).items() if name not in _STORES}
    return RunnableConfig(**{**silent, "configurable": kept})


def unheard(config: RunnableConfig) -> RunnableConfig:
    """A config in which nobody listens, and a graph shows nothing of what it does.

    A run stands around all the same: without one LangChain refuses custom events, which a function or a model may send.
    """
    return RunnableConfig(**{**_unstreamed(config), "callbacks": AsyncCallbackManager([], parent_run_id=uuid4())})


def _unstreamed(config: RunnableConfig) -> RunnableConfig:
    """A config in which ``subgraphs=True`` of a graph around shows nothing of graphs further in.

    The stream is muted and not taken out: a graph without one would leave out what it writes to ``custom``, too.
    """
    settings = config.get("configurable") or {}
    if _STREAM not in settings:
        return config
    from langgraph.pregel.protocol import StreamProtocol

    return RunnableConfig(**{**config, "configurable": {**settings, _STREAM: StreamProtocol(lambda _: None, set())}})


@contextmanager
def quiet(config: Config = alone, variables: Sequence[ContextVar[Any]] = ()) -> Iterator[None]:
    """What is called inside inherits no callback, whether by config, by context variable, or by tracing settings.

    An empty list of callbacks in the call's config does not suffice: LangChain adds those of the context variables
    (``collect_runs``, ``get_usage_metadata_callback``, ``tracing_v2_enabled``), those that a setting of the environment
    asks for, and LangSmith's to every call.

    Args:
        config: makes the config that calls inherit from the one around.
        variables: further ones that are to be None.
    """
    ambient: Any = var_child_runnable_config.get() or {}
    with ExitStack() as stack:
        set_within(stack, var_child_runnable_config, config(ambient))
        for muted in (tracing_v2_callback_var, *variables):
            set_within(stack, muted, None)
        for variable, _, handler_class, env_var in _configure_hooks:
            # Where there is none, LangChain would make one if the environment asks for it.
            set_within(stack, variable, _Mute() if handler_class and env_var else None)
        stack.enter_context(tracing_context(enabled=False))
        yield


async def begun_quietly(events: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """``events``, made by tasks that start with the first of them, as those of :mod:`tta_middleware.aio.streams` do.

    A task keeps the context variables of the moment when it starts; whoever reads the events keeps its own.
    """
    async with aclosing(events):
        try:
            with quiet():
                first = await anext(events)
        except StopAsyncIteration:
            return
        yield first
        async for event in events:
            yield event


def set_within(stack: ExitStack, variable: ContextVar[Any], value: Any) -> None:
    """Set a variable until ``stack`` is closed."""
    stack.callback(variable.reset, variable.set(value))
