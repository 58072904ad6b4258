"""What users give as ``fallback``, as the guard takes it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from inspect import isawaitable
from typing import Any

import anyio.to_thread
from langchain_core.messages import BaseMessage
from langchain_core.runnables import Runnable, RunnableConfig

from tta_middleware.chat_model.messages import to_langchain
from tta_middleware.errors import ConfigurationError
from tta_middleware.guard.settings import Fallback
from tta_middleware.moderation.adapters.plain import is_async
from tta_middleware.types import Message


def as_fallback(value: Any) -> Fallback:
    """The guard's fallback for a checked setting."""
    if value in ("refuse", "raise"):
        return value  # type: ignore[no-any-return]
    return partial(_run if isinstance(value, Runnable) else text_of, value)


async def _run(runnable: Runnable[Any, Any], messages: Sequence[Message]) -> str:
    return await text_of(runnable, to_langchain(messages))


async def text_of(part: Any, messages: Sequence[Any], config: RunnableConfig | None = None) -> str:
    """What a runnable or a function of the messages says. An ordinary function runs in a thread: others are answered
    meanwhile, and it may make sync calls.

    Callbacks are cut off, since raw tokens are not checked yet.
    """
    if isinstance(part, Runnable):
        return _text(await part.ainvoke(messages, config or RunnableConfig(callbacks=[])))
    ask = partial(part, messages)
    output = ask() if is_async(part) else await anyio.to_thread.run_sync(ask, abandon_on_cancel=True)
    return _text(await output if isawaitable(output) else output)


def _text(output: Any) -> str:
    if isinstance(output, BaseMessage):
        return str(output.text)
    if isinstance(output, Message):
        return output.content
    if isinstance(output, str):
        return output
    raise ConfigurationError(f"a fallback or replacement gives a text or a message, not {type(output).__name__}")
