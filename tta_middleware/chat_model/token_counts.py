"""Token counts by the model's own tokenizer; LangChain's default is GPT-2's, from a hub."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage, convert_to_messages

from tta_middleware.aio import bridge
from tta_middleware.chat_model.messages import from_langchain
from tta_middleware.chat_model.tools import Tool, describe
from tta_middleware.errors import ConfigurationError
from tta_middleware.protocols import Engine, TokenCounter

T = TypeVar("T")


class CountsTokens(BaseChatModel):
    """``get_num_tokens`` and its kin for a model with an engine; they load the model where that was not done yet."""

    @abstractmethod
    def _answering(self) -> Engine:
        """The engine whose tokens are counted."""

    def get_token_ids(self, text: str) -> list[int]:
        """The tokens of a text by itself.

        Raises:
            ConfigurationError: the engine does not tell its tokens.
        """
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return _now(partial(self._counter().token_ids, text))

    def get_num_tokens_from_messages(self, messages: Sequence[BaseMessage], tools: Sequence[Tool] | None = None) -> int:
        """Tokens of a conversation, or of a part of one, as a prompt: with its template, and the tools it is shown.

        Raises:
            ConfigurationError: the engine does not tell its tokens, a message cannot be read, or the model's template
                takes no tools.
        """
        turns = from_langchain(convert_to_messages(messages))
        if self.custom_get_token_ids is not None:
            return super().get_num_tokens_from_messages(list(messages))
        return _now(partial(self._counter().count_prompt, turns, tools=describe(tools or ())))

    def _counter(self) -> TokenCounter:
        engine = self._answering()
        if not isinstance(engine, TokenCounter):
            raise ConfigurationError(
                f"the engine of {engine.model_id!r} has no token_ids() and count_prompt(), so its tokens cannot be "
                "counted; add them (tta_middleware.protocols.TokenCounter), or set custom_get_token_ids="
            )
        return engine


def _now(function: Callable[[], Awaitable[T]]) -> T:
    """What an async function gives. LangChain counts in the middle of anything, even on the bridge's own thread."""
    if not bridge.here():
        return bridge.run(function)

    async def count() -> T:
        return await function()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(count())).result()
