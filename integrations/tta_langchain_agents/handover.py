"""What stands in for a message that was flagged."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import UsageMetadata, add_usage
from langchain_core.runnables import Runnable

from tta_langchain_agents.content import last_human_text, text_only, without_probabilities
from tta_langchain_agents.quiet import quiet_stream, without_callbacks
from tta_middleware.chat_model import TTAChatModel
from tta_middleware.chat_model.fallbacks import text_of
from tta_middleware.chat_model.quiet import quiet as within_a_guard
from tta_middleware.chat_model.refusal import REFUSAL, RefusedAnswerError, refused
from tta_middleware.config import check_takes_one
from tta_middleware.errors import (
    ConfigurationError,
    ContextLengthError,
    EmptyPromptError,
    FlaggedError,
    ModerationError,
)
from tta_middleware.guard.ledger import Ledger
from tta_middleware.guard.moderated import moderated
from tta_middleware.types import SEAM, Trace

OnFlagged: TypeAlias = Literal["block", "repair", "replace", "raise"]
Replacement: TypeAlias = Runnable[Any, Any] | Callable[[Sequence[BaseMessage]], str | Awaitable[str]]


@dataclass(frozen=True, slots=True)
class Handover:
    """What happens to a flagged message.

    Raises:
        ConfigurationError: an unknown action, or one without the part that it needs.
    """

    action: OnFlagged = "block"
    repair_model: TTAChatModel | None = None
    replacement: Replacement | None = None

    def __post_init__(self) -> None:
        if self.action not in get_args(OnFlagged):
            raise ConfigurationError(f"on_flagged is one of {', '.join(get_args(OnFlagged))}, not {self.action!r:.40}")
        if self.action == "repair" and not isinstance(self.repair_model, TTAChatModel):
            raise ConfigurationError("on_flagged='repair' needs repair_model=TTAChatModel(...)")
        if self.action == "replace" and not (callable(self.replacement) or isinstance(self.replacement, Runnable)):
            raise ConfigurationError("on_flagged='replace' needs replacement=, a function or a Runnable")
        if callable(self.replacement) and not isinstance(self.replacement, Runnable):
            check_takes_one("replacement", self.replacement, "lambda messages: 'Ask a colleague.'")
        given = {"repair": self.repair_model, "replace": self.replacement}
        if unused := [other for other, part in given.items() if part is not None and other != self.action]:
            name = {"repair": "repair_model", "replace": "replacement"}[unused[0]]
            raise ConfigurationError(f"on_flagged={self.action!r} never uses {name}; leave one of the two out")

    @classmethod
    def of(
        cls, action: OnFlagged | None, repair_model: TTAChatModel | None, replacement: Replacement | None
    ) -> Handover:
        """As given; without an action, the one that what was given is for."""
        if action is None:
            action = "repair" if repair_model is not None else "replace" if replacement is not None else "block"
        return cls(action, repair_model, replacement)


@dataclass(slots=True)
class StandIn:
    """The text in place of one flagged message, and its metadata once the text is out.

    Attributes:
        messages: the conversation that was to be answered.
        part: the part of the message that was flagged.
        model: name of the model that was flagged.
        usage: tokens of the flagged message, and of another model's answer in its place.
        flagged_usage: those of the flagged message alone.
        said: what has left of the flagged message.
        stop: what another model's answer ends before.
    """

    handover: Handover
    ledger: Ledger
    messages: Sequence[BaseMessage]
    part: str
    model: str = ""
    usage: UsageMetadata | None = None
    said: str = ""
    stop: list[str] | str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    flagged_usage: UsageMetadata | None = field(init=False)

    def __post_init__(self) -> None:
        self.flagged_usage = self.usage

    @property
    def trace(self) -> Trace:
        """Of the message that was flagged."""
        tokens = self.flagged_usage["output_tokens"] if self.flagged_usage else 0
        reason, method = self.ledger.reason(self.part), self.handover.action
        return self.ledger.trace(
            "blocked", reason, method=method, model=self.model, tokens=tokens, released=len(self.said)
        )

    async def stream(self) -> AsyncGenerator[str, None]:
        """Checked text, in pieces.

        Raises:
            RefusedAnswerError: an UnsafeAnswerError, where a flagged message is to raise.
        """
        reason = self.ledger.reason(self.part)
        if self.handover.action == "raise":
            trace = self.trace
            said = refused(self._notice, trace)
            raise RefusedAnswerError(
                f"a message was withheld ({reason}); catch this or set on_flagged='block'", trace, said
            )
        # Without a moderator nothing can be checked, so nothing but the notice can stand in.
        if self.handover.action == "repair" and self.ledger.error is None:
            async with aclosing(self._repaired()) as pieces:
                async for piece in pieces:
                    yield piece
            return
        text = await self._replaced() if self.handover.action == "replace" and self.ledger.error is None else None
        notice = self._notice
        self.metadata = refused(notice, self.trace).response_metadata
        if text:
            del self.metadata[REFUSAL]  # a replacement's own words are an answer; only the notice is a refusal
        yield text or notice

    async def message(self) -> AIMessage:
        """The whole message."""
        text = "".join([piece async for piece in self.stream()])
        return AIMessage(content=text, response_metadata=self.metadata, usage_metadata=self.usage)

    @property
    def _notice(self) -> str:
        return self.ledger.policy.notice_for(self._asked or "")

    @property
    def _asked(self) -> str | None:
        return last_human_text(self.messages)

    async def _repaired(self) -> AsyncGenerator[str, None]:
        """Another model's answer, which its guard has judged by itself, judged as the end of what has left, too."""
        texts = self._texts_of_another()
        if self.said.strip():
            texts = moderated(texts, self.ledger, self.ledger.policy, prompt=self._asked, behind=self.said + SEAM)
        begun = False
        try:
            async with aclosing(texts) as pieces:
                async for piece in pieces:
                    yield piece
                    begun = True
        except (FlaggedError, ModerationError, EmptyPromptError, ContextLengthError):
            # A local model reads no pictures, and less at once than the one that was flagged.
            notice = self._notice
            self.metadata = refused(notice, self.trace).response_metadata
            yield SEAM + notice if begun else notice

    async def _texts_of_another(self) -> AsyncGenerator[str, None]:
        model = self.handover.repair_model
        if model is None:
            return
        turns, config = text_only(self.messages), without_callbacks()
        chunks: AsyncGenerator[Any, None] = quiet_stream(lambda: model.astream(turns, config, stop=self.stop))  # type: ignore[arg-type, return-value]
        async with aclosing(chunks):
            async for chunk in chunks:
                self._note(chunk)
                if chunk.text:
                    yield str(chunk.text)

    def _note(self, chunk: AIMessageChunk) -> None:
        if chunk.response_metadata:
            trace = chunk.response_metadata.get("tta", {}) | {"handed_over": self.trace.as_dict()}
            self.metadata = without_probabilities(chunk.response_metadata) | {"tta": trace}
        if chunk.usage_metadata:
            self.usage = add_usage(self.usage, chunk.usage_metadata)

    async def _replaced(self) -> str | None:
        """The replacement's own text is moderated, also as the end of what has left; None where it does not pass."""
        give, messages = self.handover.replacement, list(self.messages)
        async with self.ledger.judged_errors("the replacement"):
            with within_a_guard():
                text = await text_of(give, messages, without_callbacks())
        return text if await self.ledger.passes_behind(self.said, text) else None
