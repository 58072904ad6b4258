"""What an engine tells by the model's tokenizer and embedding table alone, wherever it decodes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tta_middleware.aio import process as _process
from tta_middleware.engines.prompt.counting import count_prompt, token_ids
from tta_middleware.types import Message, PromptEmbeddings, Thought

if TYPE_CHECKING:
    from tta_middleware.engines.prompt.vocabulary import Vocabulary


class TokenisedEngine(ABC):
    """An engine whose vocabulary is known in this process; all of it is calculated in worker threads."""

    @abstractmethod
    async def _ready(self) -> Vocabulary:
        """The vocabulary, once the engine can decode."""

    async def embed(
        self,
        messages: Sequence[Message],
        *,
        assistant_prefix: str = "",
        tools: Sequence[Mapping[str, Any]] = (),
        thought: Thought | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> PromptEmbeddings:
        """Render the chat template and look the tokens up; see :class:`tta_middleware.protocols.Engine`.

        ``thought`` and ``template`` are those of :class:`tta_middleware.protocols.ReasoningEngine`. Scaling that a
        family applies outside its embedding module (Gemma) is left to what decodes: the rows are what it takes.

        Raises:
            EmptyPromptError: the last user turn is empty, or there is none.
            ConfigurationError: no chat template, roles, tools or arguments that it refuses, or a prompt that fills the
                context.
        """
        vocabulary = await self._ready()
        return await _process.calculate(
            vocabulary.prompt, list(messages), assistant_prefix, list(tools), thought, template
        )

    async def thinks(self) -> bool:
        """Whether the model's thoughts can be told apart; see :class:`tta_middleware.protocols.ReasoningEngine`."""
        return (await self._ready()).marks is not None

    async def close_thought(self, prompt: PromptEmbeddings, token_ids: Sequence[int]) -> PromptEmbeddings:
        """See :class:`tta_middleware.protocols.ReasoningEngine`.

        Raises:
            ConfigurationError: the prompt fills the context then.
        """
        vocabulary = await self._ready()
        closed = await _process.calculate(vocabulary.closed_thought, prompt, list(token_ids))
        vocabulary.check_length(len(closed.token_ids))
        return closed

    async def token_ids(self, text: str) -> list[int]:
        """The tokens of a text by itself; see :class:`tta_middleware.protocols.TokenCounter`."""
        vocabulary = await self._ready()
        return await _process.calculate(token_ids, vocabulary.tokenizer, text)

    async def count_prompt(self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] = ()) -> int:
        """Tokens of a conversation with its template; see :class:`tta_middleware.protocols.TokenCounter`."""
        vocabulary = await self._ready()
        return await _process.calculate(count_prompt, vocabulary.tokenizer, list(messages), list(tools))
