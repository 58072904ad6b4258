"""A chat model without a model, for tests of agents: its messages follow a script."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, ToolCallChunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from pydantic import Field


class ScriptedChatModel(BaseChatModel):
    """Gives its answers in order, the last one for good; streams them word by word, tool calls in two pieces.

    Attributes:
        answers: messages, or their text.
        before_chunk: called before each chunk of a stream, with its number in the stream.
        asked: the conversations that were to be answered.
    """

    answers: list[Any] = Field(exclude=True, repr=False)
    before_chunk: Callable[[int], object] = Field(lambda _number: None, exclude=True, repr=False)
    asked: list[list[BaseMessage]] = Field(default_factory=list, exclude=True, repr=False)
    model_name: str = "scripted"

    @property
    def _llm_type(self) -> str:
        return "scripted-chat-model"

    def bind_tools(
        self, tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool], **kwargs: Any
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """The tools change nothing: the script says when they are called."""
        return self.bind()

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=self._next(messages))])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        for number, chunk in enumerate(_chunks(self._next(messages))):
            self.before_chunk(number)
            if run_manager is not None:
                run_manager.on_llm_new_token(chunk.text, chunk=ChatGenerationChunk(message=chunk))
            yield ChatGenerationChunk(message=chunk)

    def _next(self, messages: list[BaseMessage]) -> AIMessage:
        answer = self.answers[min(len(self.asked), len(self.answers) - 1)]
        self.asked.append(messages)
        return AIMessage(answer) if isinstance(answer, str) else answer.model_copy(deep=True)


def _chunks(message: AIMessage) -> Iterator[AIMessageChunk]:
    """The message in pieces that add up to it."""
    for block in [message.content] if isinstance(message.content, str) else message.content:
        yield from _block_chunks(block)
    for index, call in enumerate(message.tool_calls):
        args = json.dumps(call["args"])
        middle = len(args) // 2
        yield _call_chunk(call["name"], args[:middle], call["id"], index)
        yield _call_chunk(None, args[middle:], None, index)
    yield AIMessageChunk(
        content="",
        id=message.id,
        additional_kwargs=message.additional_kwargs,
        response_metadata=message.response_metadata,
        usage_metadata=message.usage_metadata,
    )


def _block_chunks(block: str | dict[str, Any]) -> Iterator[AIMessageChunk]:
    if isinstance(block, str):
        yield from (AIMessageChunk(content=word) for word in _words(block))
        return
    key = str(block.get("type"))
    if not isinstance(block.get(key), str):
        yield AIMessageChunk(content=[block])
        return
    for word in _words(block[key]):
        yield AIMessageChunk(content=[{**block, key: word}])


def _words(text: str) -> list[str]:
    words = text.split(" ")
    return [word if index == 0 else f" {word}" for index, word in enumerate(words)]


def _call_chunk(name: str | None, args: str, id_: str | None, index: int) -> AIMessageChunk:
    return AIMessageChunk(
        content="", tool_call_chunks=[ToolCallChunk(name=name, args=args, id=id_, index=index, type="tool_call_chunk")]
    )
