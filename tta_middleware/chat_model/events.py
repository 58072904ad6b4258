"""A repair's progress as LangChain custom events and on LangGraph's ``custom`` stream; never with any text."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any, Final, TypeAlias

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun
from langchain_core.callbacks.manager import ahandle_event
from langchain_core.runnables.config import ensure_config, get_async_callback_manager_for_config

from tta_middleware.types import RepairFinished, RepairStarted, RepairStep

RepairEvent: TypeAlias = RepairStarted | RepairStep | RepairFinished

NAMES: Final[dict[type[RepairEvent], str]] = {
    RepairStarted: "tta_repair_started",
    RepairStep: "tta_repair_step",
    RepairFinished: "tta_repair_finished",
}


async def announce(event: RepairEvent, run_manager: AsyncCallbackManagerForLLMRun | None) -> None:
    """Tell the callbacks of the run that is under way: the model's own, or that of the chain or node around it.

    A model that is streamed by itself, outside any chain, gives LangChain no run to attach events to; the trace in
    the last chunk's ``response_metadata`` says the same.
    """
    name, data = NAMES[type(event)], asdict(event)
    _write_custom(name, data)
    if run_manager is not None:
        handlers, run_id = run_manager.handlers, run_manager.run_id
        tags, metadata = run_manager.tags, run_manager.metadata
        await ahandle_event(
            handlers, "on_custom_event", "ignore_custom_event", name, data, run_id=run_id, tags=tags, metadata=metadata
        )
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
