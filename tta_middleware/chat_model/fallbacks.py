"""What users give as ``fallback``, as the guard takes it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from inspect import isawaitable
from typing import Any

import anyio.to_thread
from langchain_core.messages import BaseMessage
from langchain_core.runnables import Runnable

from tta_middleware.chat_model.messages import to_langchain
from tta_middleware.errors import ConfigurationError
from tta_middleware.guard.settings import Fallback
from tta_middleware.moderation.adapters.plain import is_async
from tta_middleware.types import Message


def as_fallback(value: Any) -> Fallback:
    """The guard's fallback for a checked setting."""
    if value in ("refuse", "raise"):
        return value  # type: ignore[no-any-return]
    return partial(_run if isinstance(value, Runnable) else _call, value)


async def _run(runnable: Runnable[Any, Any], messages: Sequence[Message]) -> str:
    """The runnable's text. Callbacks are cut off, since its raw tokens are not checked yet."""
    return _text(await runnable.ainvoke(to_langchain(messages), config={"callbacks": []}))


async def _call(function: Any, messages: Sequence[Message]) -> str:
    """The function's text; an ordinary function runs in a thread, so that others are answered meanwhile."""
    ask = partial(function, messages)
    output = ask() if is_async(function) else await anyio.to_thread.run_sync(ask, abandon_on_cancel=True)
    return _text(await output if isawaitable(output) else output)


def _text(output: Any) -> str:
    if isinstance(output, BaseMessage):
        return str(output.text)
    if isinstance(output, Message):
        return output.content
    if isinstance(output, str):
        return output
    raise ConfigurationError(f"a fallback gives a text or a message, not {type(output).__name__}")
