"""A repair's progress as LangChain custom events and on LangGraph's ``custom`` stream; never with any text."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any, Final, TypeAlias

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.callbacks.manager import ahandle_event
from langchain_core.runnables.config import ensure_config, get_async_callback_manager_for_config

from tta_middleware.guard.events import RepairFinished, RepairStarted, RepairStep

Run: TypeAlias = AsyncCallbackManagerForLLMRun | CallbackManagerForLLMRun | None
RepairEvent: TypeAlias = RepairStarted | RepairStep | RepairFinished

NAMES: Final[dict[type[RepairEvent], str]] = {
    RepairStarted: "tta_repair_started",
    RepairStep: "tta_repair_step",
    RepairFinished: "tta_repair_finished",
}


async def announce(event: RepairEvent, run: Run) -> None:
    """Tell the callbacks of the run that is under way: the model's own, or that of the chain or node around it.

    A model that is streamed by itself, outside any chain, gives LangChain no run to attach events to; the trace in
    the last chunk's ``response_metadata`` says the same.
    """
    name, data = NAMES[type(event)], asdict(event)
    _write_custom(name, data)
    if run is not None:
        about: dict[str, Any] = {"run_id": run.run_id, "tags": run.tags, "metadata": run.metadata}
        await ahandle_event(run.handlers, "on_custom_event", "ignore_custom_event", name, data, **about)
        return
    around = get_async_callback_manager_for_config(ensure_config())
    if around.parent_run_id is not None:
        await around.on_custom_event(name, data, run_id=around.parent_run_id)


def _write_custom(name: str, data: dict[str, Any]) -> None:
    """LangGraph's stream writer, if this runs inside a graph; never imports LangGraph by itself."""
    if "langgraph" not in sys.modules:
        return
    from langgraph.config import get_stream_writer

    try:
        write = get_stream_writer()
    except (KeyError, RuntimeError):
        return
    write({"type": name, **data})
