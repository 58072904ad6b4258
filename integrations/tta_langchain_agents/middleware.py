"""``TTAMiddleware``: the guard for agents that LangChain's ``create_agent`` builds."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

from langchain.agents.middleware import (
    AgentMiddleware,
    ModelRequest,
    ModelResponse,
    TracePolicy,
    hook_config,
    omit_payload,
)
from langchain.agents.middleware.types import ExtendedModelResponse, ToolCallRequest
from langchain.agents.structured_output import StructuredOutputError
from langchain_core.messages import ToolMessage
from langgraph.types import Command

from tta_langchain_agents.chat_model import guards_itself
from tta_langchain_agents.content import last_human_text
from tta_langchain_agents.handover import OnFlagged, Replacement
from tta_langchain_agents.model_call import ModelCall
from tta_langchain_agents.quiet import unspanned
from tta_langchain_agents.settings import MiddlewareSettings
from tta_langchain_agents.tools import GuardedTool, ResultChecks, ResultGuard
from tta_langchain_agents.whole_run import WholeRun, updates
from tta_middleware.aio import bridge
from tta_middleware.chat_model import TTAChatModel
from tta_middleware.config import Windows
from tta_middleware.errors import ConfigurationError
from tta_middleware.protocols import Moderator

TOOL_NOTICE = "The result of this tool was withheld by the content policy."

ModelHandler = Callable[[ModelRequest[Any]], ModelResponse[Any]]
AsyncModelHandler = Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
ToolResult = ToolMessage | Command[Any]


class TTAMiddleware(AgentMiddleware[Any, Any, Any]):
    """Checks what the agent's model says and its tools give back, before state, checkpoints or streams hold it.

    A TTAChatModel guards and repairs its own answers and is left alone. Any other model's messages are checked, text,
    reasoning and tool calls, and a flagged one is replaced under the same id. A model that another middleware puts in
    the agent's place is guarded as well. What other middleware writes by itself is checked once it is in the state:
    before the model reads it, after the model, and when the run ends. Put this one first, so that nothing of it has
    been streamed by then.

    Args:
        moderator: ``local``, ``openai``, or a Moderator.
        policy: a threshold, thresholds per category, a Policy, or StagePolicies: ``prompt`` for what the user wrote,
            ``output`` for the rest.
        on_flagged: what happens to a model's flagged message; see :class:`GuardedChatModel`. A flagged tool result
            raises with ``raise`` and is replaced by ``tool_notice`` otherwise.
        repair_model: a local model that answers in place of a flagged one.
        replacement: a function of the messages, or a Runnable, whose text is moderated and stands in.
        release: ``window`` streams text as it is checked; ``end`` holds every message until all of it was checked.
        check_prompt: whether the user's messages since the last answer are checked before the model is called; a
            flagged one is replaced by the policy's notice in the state, and answered with it.
        check_tool_results: whether what tools give back is checked. A checked tool runs without callbacks, so that
            nothing that it calls in turn is heard of.
        tool_notice: the text in place of a flagged tool result; the model reads it.
        check_state: keys of the state, ``messages`` aside, that are checked where a tool writes them; a flagged value
            is not written, and the notice takes the place of the tool's result.
        check_artifacts: whether the artifacts of tool results are checked as well.
        check_history: whether messages before the user's last one are checked, if this process has not seen them. What
            cannot be scored there stays.

    Raises:
        ConfigurationError: a value is unknown or does not fit another.
    """

    trace_policy = TracePolicy(process_inputs=omit_payload)
    """The spans of these hooks record what they give back, not what they were given to check."""

    def __init__(
        self,
        moderator: str | Moderator = "local",
        *,
        policy: Any = None,
        on_flagged: OnFlagged | None = None,
        repair_model: TTAChatModel | None = None,
        replacement: Replacement | None = None,
        release: Literal["window", "end"] | Windows = "window",
        check_prompt: bool = False,
        check_tool_results: bool = True,
        tool_notice: str = TOOL_NOTICE,
        check_state: Collection[str] = (),
        check_artifacts: bool = False,
        check_history: bool = True,
    ) -> None:
        super().__init__()
        self._settings = MiddlewareSettings(moderator, policy, on_flagged, repair_model, replacement, release)
        self._check_prompt = check_prompt
        self._check_tool_results = check_tool_results
        self._check_history = check_history
        raises = self._settings.handover.action == "raise"
        self._result_checks = ResultChecks(tool_notice, _keys(check_state), check_artifacts, raises)

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: ModelHandler
    ) -> ModelResponse[Any] | ExtendedModelResponse[Any]:
        call = self._model_call(request)
        if (refusal := bridge.run(call.refusal)) is not None:
            return refusal
        try:
            with self._around_others(request):
                response = handler(call.guarded())
        except StructuredOutputError as error:
            return call.without_structure(error)
        return bridge.run(partial(call.checked, response))

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: AsyncModelHandler
    ) -> ModelResponse[Any] | ExtendedModelResponse[Any]:
        call = self._model_call(request)
        if (refusal := await call.refusal()) is not None:
            return refusal
        try:
            with self._around_others(request):
                response = await handler(call.guarded())
        except StructuredOutputError as error:
            return call.without_structure(error)
        return await call.checked(response)

    def wrap_tool_call(self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], ToolResult]) -> ToolResult:
        guard = self._result_guard(request)
        if not bridge.run(partial(guard.call_may_run, request.tool_call)):
            return guard.withheld_call(request.tool_call)
        if not self._check_tool_results:
            return handler(request)
        with unspanned():
            result = handler(_with_guarded_tool(request, guard))
        return bridge.run(partial(guard.checked, result))  # type: ignore[no-any-return]

    async def awrap_tool_call(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], Awaitable[ToolResult]]
    ) -> ToolResult:
        guard = self._result_guard(request)
        if not await guard.call_may_run(request.tool_call):
            return guard.withheld_call(request.tool_call)
        if not self._check_tool_results:
            return await handler(request)
        with unspanned():
            result = await handler(_with_guarded_tool(request, guard))
        return await guard.checked(result)  # type: ignore[no-any-return]

    @hook_config(can_jump_to=["end"])
    def after_model(self, state: Any, runtime: Any) -> dict[str, Any] | None:
        return bridge.run(partial(self._look_over, state, may_end=True))

    @hook_config(can_jump_to=["end"])
    async def aafter_model(self, state: Any, runtime: Any) -> dict[str, Any] | None:
        return await self._look_over(state, may_end=True)

    def after_agent(self, state: Any, runtime: Any) -> dict[str, Any] | None:
        return bridge.run(partial(self._look_over, state))

    async def aafter_agent(self, state: Any, runtime: Any) -> dict[str, Any] | None:
        return await self._look_over(state)

    async def aclose(self) -> None:
        """Release the moderator's sockets, if it was made here; the next call makes it again."""
        await self._settings.runtime.aclose()

    async def _look_over(self, state: Any, *, may_end: bool = False) -> dict[str, Any] | None:
        """What has to change in the state: messages under their ids, and what was parsed from them."""
        messages = state["messages"]
        changed = updates(messages, await self._whole_run().checked(messages), messages)
        update: dict[str, Any] = {"messages": changed} if changed else {}
        if changed and state.get("structured_response") is not None:
            update["structured_response"] = None
        # A jump that the model's node asked for is forgotten in this one.
        if may_end and (state.get("jump_to") == "end" or "structured_response" in update):
            update["jump_to"] = "end"
        return update or None

    @staticmethod
    def _around_others(request: ModelRequest[Any]) -> AbstractContextManager[None]:
        """A model that guards itself could not be traced alone, so there the spans of other middleware stay."""
        return nullcontext() if guards_itself(request.model) else unspanned()

    def _model_call(self, request: ModelRequest[Any]) -> ModelCall:
        return ModelCall(self._settings, request, self._whole_run(), check_prompt=self._check_prompt)

    def _whole_run(self) -> WholeRun:
        return WholeRun(self._settings, self._result_checks, self._check_tool_results, self._check_history)

    def _result_guard(self, request: ToolCallRequest) -> ResultGuard:
        settings, messages = self._settings, request.state["messages"] if isinstance(request.state, Mapping) else []
        ledger, name = settings.ledger("output", "tool result"), request.tool_call["name"]
        return ResultGuard(ledger, self._result_checks, settings.approvals, name, last_human_text(messages))


def _keys(given: Collection[str]) -> frozenset[str]:
    if isinstance(given, str):
        raise ConfigurationError(f"check_state is a collection of keys of the state; write check_state=({given!r},)")
    return frozenset(given)


def _with_guarded_tool(request: ToolCallRequest, guard: ResultGuard) -> ToolCallRequest:
    """A tool that is not registered has nothing to run; its error message is checked like any other."""
    if request.tool is None:
        return request
    return request.override(tool=GuardedTool.around(request.tool, guard))
