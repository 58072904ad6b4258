"""What the endpoints know of a served model, and an answer of one of ours."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Protocol, cast

from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.runnables import Runnable

from tta_middleware.aio.streams import cancelled_once
from tta_middleware.chat_model import TTAChatModel
from tta_middleware.guard.settings import PromptCheck
from tta_middleware.policy import StagePolicies
from tta_middleware.protocols import Moderator
from tta_middleware.server.chat_request import ChatRequest


class ServedModel(Protocol):
    """A guarded model: :class:`~tta_middleware.chat_model.TTAChatModel`, or an upstream behind a guard."""

    @property
    def policy(self) -> Any:
        """As it was set; a text is the name of a policy."""
        ...

    @property
    def prompt_check(self) -> PromptCheck: ...

    @property
    def scorer(self) -> Moderator:
        """Whom its guard asks."""
        ...

    def policies_in_force(self, name: str | None = None) -> StagePolicies:
        """See :meth:`TTAChatModel.policies_in_force`."""
        ...

    async def aload(self) -> None: ...

    async def aclose(self) -> None: ...


class Answering(Protocol):
    """One answer that was asked for: taken whole, or as a stream."""

    async def whole(self) -> AIMessage: ...

    def stream(self) -> AsyncGenerator[AIMessageChunk, None]: ...


class Foreign(ServedModel, Protocol):
    """A served model that is no chat model of this package; whoever makes one guards it."""

    def answering(self, asked: ChatRequest, stages: StagePolicies, most_tokens: int | None) -> Answering:
        """An answer to a request, not yet begun."""
        ...


@dataclass(frozen=True, slots=True)
class LocalAnswer:
    """An answer of a chat model of this process, through its public face."""

    runnable: Runnable[LanguageModelInput, AIMessage]
    conversation: list[BaseMessage]

    @classmethod
    def of(cls, model: TTAChatModel, asked: ChatRequest, stages: StagePolicies, most_tokens: int | None) -> LocalAnswer:
        """The chat model as this request uses it."""
        settings = asked.settings(model.prompt_check, most_tokens, model.max_new_tokens) | {"policy": stages}
        tools = asked.tool_settings()
        if tools is not None:
            return cls(model.bind_tools(**tools, **settings), asked.conversation)
        return cls(cast("Runnable[LanguageModelInput, AIMessage]", model.bind(**settings)), asked.conversation)

    async def whole(self) -> AIMessage:
        return await cancelled_once(self.runnable.ainvoke(self.conversation))

    def stream(self) -> AsyncGenerator[AIMessageChunk, None]:
        return cast("AsyncGenerator[AIMessageChunk, None]", self.runnable.astream(self.conversation))
