"""Tool results: what a tool gives back is checked before a callback, the state or the model sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

from langchain_core.messages import ToolMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool, ToolException
from langgraph.errors import GraphBubbleUp
from langgraph.types import Command
from pydantic import Field

from tta_langchain_agents.content import content_texts
from tta_langchain_agents.ledger import Ledger
from tta_langchain_agents.quiet import quiet, without_callbacks
from tta_middleware import bridge
from tta_middleware.errors import UnsafeAnswerError

Result: TypeAlias = ToolMessage | Command[Any]


@dataclass(frozen=True, slots=True)
class ResultGuard:
    """Checks the results of one tool call.

    Attributes:
        notice: the text in place of a flagged result; the model reads it.
        raises: a flagged result raises instead.
    """

    ledger: Ledger
    notice: str
    raises: bool = False

    async def settle(self, output: Any) -> Any:
        """What a tool gave back, with the flagged messages in it replaced."""
        match output:
            case ToolMessage():
                return await self._settle_message(output)
            case Command(update={"messages": [*messages]}):
                update: Any = output.update
                return replace(output, update={**update, "messages": await self._settle_all(messages)})
            case list():
                return await self._settle_all(output)
        return output

    async def error_may_be_shown(self, error: Exception) -> bool:
        """Whether an error's text passes; callbacks and the model get to see it."""
        return await self.ledger.passes([str(error)])

    async def _settle_all(self, items: Sequence[Any]) -> list[Any]:
        return [await self.settle(item) for item in items]

    async def _settle_message(self, message: ToolMessage) -> ToolMessage:
        """The same message, or one under the same ids that says it was withheld; the artifact goes with the content."""
        texts = content_texts(message)
        if not texts or await self.ledger.passes(texts):
            return message
        reason = self.ledger.reason("tool_result")
        trace = self.ledger.trace("blocked", reason, method="raise" if self.raises else "block")
        if self.raises:
            raise UnsafeAnswerError(f"a tool's result was withheld ({reason}); or set on_flagged='block'", trace)
        self.ledger.approved.add(self.notice)
        return ToolMessage(
            content=self.notice,
            id=message.id,
            name=message.name,
            tool_call_id=message.tool_call_id,
            status="error",
            response_metadata={"tta": trace.as_dict()},
        )


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

    def _run(self, tool_input: Any, tool_call_id: str | None, config: RunnableConfig) -> Any:
        guard: ResultGuard = self.guard
        try:
            with quiet():
                output = self.inner.invoke(self._call(tool_input, tool_call_id), without_callbacks(config))
        except GraphBubbleUp:
            raise
        except Exception as error:
            if bridge.run(partial(guard.error_may_be_shown, error)):
                raise
            raise ToolException(guard.notice) from None
        return bridge.run(partial(guard.settle, output))

    async def _arun(self, tool_input: Any, tool_call_id: str | None, config: RunnableConfig) -> Any:
        guard: ResultGuard = self.guard
        try:
            with quiet():
                output = await self.inner.ainvoke(self._call(tool_input, tool_call_id), without_callbacks(config))
        except GraphBubbleUp:
            raise
        except Exception as error:
            if await guard.error_may_be_shown(error):
                raise
            raise ToolException(guard.notice) from None
        return await guard.settle(output)

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
