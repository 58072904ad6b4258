"""Tool results: what a tool gives back is checked before a callback, the state or the model sees it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias, cast

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    BaseMessageChunk,
    ChatMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolCall,
    ToolMessage,
    convert_to_messages,
    message_chunk_to_message,
)
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool, ToolException
from langgraph.errors import GraphBubbleUp, GraphInterrupt, ParentCommand
from langgraph.types import Command, Interrupt, Overwrite
from pydantic import Field

from tta_langchain_agents.content import material, plain_text
from tta_langchain_agents.ledger import Approvals
from tta_langchain_agents.quiet import quiet, spanned, without_callbacks
from tta_middleware.aio import bridge
from tta_middleware.call_text import call_text
from tta_middleware.chat_model.refusal import refused
from tta_middleware.errors import UnsafeAnswerError
from tta_middleware.guard.ledger import Ledger
from tta_middleware.types import Trace


@dataclass(frozen=True, slots=True)
class ResultChecks:
    """What of a tool's results is checked beside its messages, and what the model reads in place of a flagged one.

    Attributes:
        state: keys of the state whose updates are checked as well.
        artifacts: whether artifacts are.
        raises: a flagged result raises instead.
    """

    notice: str
    state: frozenset[str] = frozenset()
    artifacts: bool = False
    raises: bool = False


@dataclass(frozen=True, slots=True)
class ResultGuard:
    """Checks the results of one call of the tool ``tool``.

    Attributes:
        approvals: told of what passes.
        prompt: the question that the run is about; messages in the model's name answer it.
    """

    ledger: Ledger
    checks: ResultChecks
    approvals: Approvals
    tool: str = ""
    prompt: str | None = None

    @property
    def notice(self) -> str:
        return self.checks.notice

    async def checked(self, output: Any) -> Any:
        """What a tool gave back, with the flagged messages in it replaced.

        Raises:
            ToolException: it writes something into the messages that is no message.
            UnsafeAnswerError: something is flagged, and is to raise.
        """
        match output:
            case BaseMessage():
                return await self._settle_message(output)
            case Command():
                return await self._settle_command(output)
            case list():
                return [await self.checked(item) for item in output]
        # LangChain makes no message of the result of a call without an id, and tells callbacks of it as it is.
        return output if await self._value_passes("tool_result", output) else self.notice

    async def checked_signal(self, signal: GraphBubbleUp) -> GraphBubbleUp:
        """What a tool tells LangGraph by raising it: a command for the graph around, or a question to a person."""
        match signal:
            case ParentCommand():
                return ParentCommand(await self._settle_command(signal.args[0]))
            case GraphInterrupt() if signal.args:
                return GraphInterrupt([await self._settle_question(one) for one in signal.args[0]])
        return signal

    async def _settle_question(self, question: Interrupt) -> Interrupt:
        passes = await self._value_passes("interrupt", question.value)
        return question if passes else replace(question, value=self.notice)

    async def _settle_command(self, command: Command[Any]) -> Command[Any]:
        """LangGraph makes messages of what a command holds only after this, so that is done here first."""
        # No public name reads every form of an update as LangGraph itself will.
        if not (pairs := command._update_as_tuples()):
            return command
        flagged = [
            key
            for key, value in pairs
            if key in self.checks.state and not await self._value_passes(f"state: {key}", overwritten(value)[0])
        ]
        # The model must not read that something was written which was not.
        settled = [
            (key, await rewritten(key, value, self._withheld_result if flagged else self._settle_message))
            for key, value in pairs
            if key not in flagged
        ]
        return replace(command, update=_like(command.update, settled))

    async def _value_passes(self, part: str, value: Any) -> bool:
        """Whether what is no message may be shown.

        Raises:
            UnsafeAnswerError: it may not, and is to raise.
        """
        text = plain_text(value)
        if not text.strip() or await self.ledger.passes([text]):
            return True
        self._raise_or_trace(part)
        return False

    async def _settle_message(self, message: BaseMessage) -> BaseMessage:
        """The same message, or one under the same ids that says it was withheld."""
        if isinstance(message, RemoveMessage):
            return RemoveMessage(id=str(message.id))
        texts, prompt = self.texts(message), self.prompt if isinstance(message, AIMessage) else None
        if not texts or await self.ledger.passes(texts, prompt):
            self.approvals.add(texts, prompt)
            return message
        return self._withheld(message)

    async def call_may_run(self, call: ToolCall) -> bool:
        """Whether the call is one that was checked, or passes now: other middleware may have written it."""
        texts = [call_text(call["name"], call["args"])]
        return self.approvals.hold(texts, self.prompt) or await self.ledger.passes(texts, self.prompt)

    def withheld_call(self, call: ToolCall) -> ToolMessage:
        """The result of a call that may not be carried out.

        Raises:
            UnsafeAnswerError: it is to raise.
        """
        message = ToolMessage("", tool_call_id=call["id"], name=call["name"])
        return cast(ToolMessage, self._withheld(message, "tool_call"))

    async def _withheld_result(self, message: BaseMessage) -> BaseMessage:
        return self._withheld(message) if isinstance(message, ToolMessage) else await self._settle_message(message)

    def texts(self, message: BaseMessage) -> list[str]:
        """All of a message that is checked."""
        texts = material(message).texts
        if message.name and message.name != self.tool:
            texts.append(message.name)
        if isinstance(message, ChatMessage):
            texts.append(message.role)
        if self.checks.artifacts and isinstance(message, ToolMessage) and message.artifact is not None:
            texts.append(plain_text(message.artifact))
        return [text for text in texts if text.strip()]

    def _withheld(self, message: BaseMessage, part: str = "tool_result") -> BaseMessage:
        """The notice in a message's place; artifact, calls and attributes go with the content."""
        trace = self._raise_or_trace(part)
        self.approvals.add([self.notice], self.prompt if isinstance(message, AIMessage) else None)
        kept: dict[str, Any] = {"content": self.notice, "id": message.id, "response_metadata": {"tta": trace.as_dict()}}
        match message:
            case ToolMessage():
                name = self.tool or message.name
                return ToolMessage(**kept, name=name, tool_call_id=message.tool_call_id, status="error")
            case AIMessage():
                return refused(self.notice, trace).model_copy(update={"id": message.id})
            case SystemMessage():
                return SystemMessage(**kept)
        return HumanMessage(**kept)

    def _raise_or_trace(self, part: str) -> Trace:
        reason, raises = self.ledger.reason(part), self.checks.raises
        trace = self.ledger.trace("blocked", reason, method="raise" if raises else "block")
        if raises:
            raise UnsafeAnswerError(f"a tool's result was withheld ({reason}); or set on_flagged='block'", trace)
        return trace


CheckMessage: TypeAlias = Callable[[BaseMessage], Awaitable[BaseMessage]]


def _like(update: Any, pairs: list[tuple[str, Any]]) -> Any:
    """What writes these pairs, in the form in which the update came; objects become pairs, which LangGraph reads alike.

    What names no key is the whole state of a graph that has but one value.
    """
    if [key for key, _ in pairs] == ["__root__"] and not isinstance(update, Mapping):
        return pairs[0][1]
    return dict(pairs) if isinstance(update, Mapping) else list(pairs) if isinstance(update, list) else tuple(pairs)


async def rewritten(key: str, value: Any, check: CheckMessage) -> Any:
    """What an update writes under a key, with every message in it settled.

    Under ``messages`` stands whatever LangGraph makes messages of; elsewhere, only messages are messages.
    """
    inner, wraps = overwritten(value)
    if wraps:
        return Overwrite(await rewritten(key, inner, check))
    if isinstance(value, BaseMessage):
        return await check(value)
    if isinstance(value, list | tuple) and all(isinstance(item, BaseMessage) for item in value):
        return type(value)([await check(_whole(item)) for item in value])
    if key == "messages" and value is not None:
        return [await check(_whole(message)) for message in as_messages(value)]
    if isinstance(value, list | tuple) and any(isinstance(item, BaseMessage) for item in value):
        return [await check(item) if isinstance(item, BaseMessage) else item for item in value]
    return value


def overwritten(value: Any) -> tuple[Any, bool]:
    """What is written past a reducer, in LangGraph's three forms, and whether it is."""
    match value:
        case Overwrite():
            return value.value, True
        case {"__overwrite__": inner} if len(value) == 1:
            return inner, True
        case {"type": "__overwrite__", "value": inner}:
            return inner, True
    return value, False


def as_messages(value: Any) -> list[BaseMessage]:
    """What LangGraph makes of what is written into the messages: of dicts, tuples and strings, too.

    Raises:
        ToolException: LangChain cannot read it; its own error would show the words.
    """
    try:
        return convert_to_messages(value if isinstance(value, list) else [value])
    except (AttributeError, KeyError, NotImplementedError, TypeError, ValueError) as error:
        kind = type(error).__name__
        raise ToolException(f"what the tool wrote are no messages that LangChain can read ({kind})") from None


def _whole(message: BaseMessage) -> BaseMessage:
    return message_chunk_to_message(message) if isinstance(message, BaseMessageChunk) else message


class GuardedTool(BaseTool):
    """A tool that runs another one without callbacks and announces only its checked result."""

    inner: BaseTool = Field(repr=False)
    guard: Any = Field(repr=False, exclude=True)

    @classmethod
    def around(cls, tool: BaseTool, guard: ResultGuard) -> GuardedTool:
        """The tool's own callbacks move to the guarded one."""
        inner = tool.model_copy(update={"callbacks": None}) if tool.callbacks else tool
        return cls(
            name=tool.name,
            description=tool.description,
            args_schema=tool.args_schema or tool.get_input_schema(),
            return_direct=tool.return_direct,
            callbacks=tool.callbacks,
            tags=tool.tags,
            metadata=tool.metadata,
            inner=inner,
            guard=guard,
        )

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:  # noqa: A002
        with spanned():
            return super().invoke(input, config, **kwargs)

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:  # noqa: A002
        with spanned():
            return await super().ainvoke(input, config, **kwargs)

    def _run(self, tool_input: Any, tool_call_id: str | None, config: RunnableConfig) -> Any:
        guard: ResultGuard = self.guard
        try:
            with quiet():
                output = self.inner.invoke(self._call(tool_input, tool_call_id), without_callbacks(config))
        except GraphBubbleUp as error:
            raise bridge.run(partial(guard.checked_signal, error)) from None
        except Exception as error:
            if bridge.run(partial(guard.ledger.shows, error)):
                raise
            raise ToolException(guard.notice) from None
        return bridge.run(partial(guard.checked, output))

    async def _arun(self, tool_input: Any, tool_call_id: str | None, config: RunnableConfig) -> Any:
        guard: ResultGuard = self.guard
        try:
            with quiet():
                output = await self.inner.ainvoke(self._call(tool_input, tool_call_id), without_callbacks(config))
        except GraphBubbleUp as error:
            raise await guard.checked_signal(error) from None
        except Exception as error:
            if await guard.ledger.shows(error):
                raise
            raise ToolException(guard.notice) from None
        return await guard.checked(output)

    def _call(self, tool_input: Any, tool_call_id: str | None) -> Any:
        if tool_call_id is None:
            return tool_input
        return {"type": "tool_call", "name": self.name, "args": tool_input, "id": tool_call_id}

    def _to_args_and_kwargs(self, tool_input: Any, tool_call_id: str | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """As they came: the inner tool parses and validates them."""
        return (tool_input, tool_call_id), {}

    def _filter_injected_args(self, tool_input: dict[str, Any]) -> dict[str, Any]:
        """What callbacks get to see of the input is the inner tool's affair."""
        return self.inner._filter_injected_args(tool_input)
