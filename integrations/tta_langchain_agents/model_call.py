"""One model call of an agent behind the guard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from langchain.agents.middleware import ModelRequest, ModelResponse
from langchain.agents.middleware.types import ExtendedModelResponse
from langchain.agents.structured_output import StructuredOutputError
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langgraph.types import Command

from tta_langchain_agents.content import last_human_text, material
from tta_langchain_agents.handover import Handover, StandIn
from tta_langchain_agents.inner import model_name
from tta_langchain_agents.ledger import Books
from tta_langchain_agents.settings import MiddlewareSettings, checked_message
from tta_langchain_agents.whole_run import WholeRun, updates
from tta_middleware.errors import UnsafeAnswerError

Response = ModelResponse[Any] | ExtendedModelResponse[Any]


@dataclass(init=False)
class GuardedRequest(ModelRequest[Any]):
    """A request whose model is guarded, and stays so when another middleware puts a different one in its place."""

    guard: Callable[[BaseChatModel], BaseChatModel] = field(default=lambda model: model)

    def __init__(self, *, guard: Callable[[BaseChatModel], BaseChatModel], model: BaseChatModel, **fields: Any) -> None:
        super().__init__(model=guard(model), **fields)
        object.__setattr__(self, "guard", guard)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, self.guard(value) if name == "model" and "guard" in vars(self) else value)

    @classmethod
    def of(cls, request: ModelRequest[Any], guard: Callable[[BaseChatModel], BaseChatModel]) -> Self:
        """The same request, guarded."""
        fields = {name: getattr(request, name) for name in ModelRequest.__dataclass_fields__}
        return cls(guard=guard, **fields)


@dataclass(slots=True)
class ModelCall:
    """What happens to one request and its response."""

    settings: MiddlewareSettings
    request: ModelRequest[Any]
    whole_run: WholeRun
    check_prompt: bool = False
    _updates: list[BaseMessage] = field(default_factory=list)
    _books: Books = field(default_factory=Books)

    def guarded(self) -> ModelRequest[Any]:
        """The request with its model behind the guard."""
        return GuardedRequest.of(self.request, lambda model: self.settings.guard(model, self._books))

    async def refusal(self) -> Response | None:
        """The answer where the model is not called: to a flagged prompt, where prompts are checked, or to a run whose
        last message had to be replaced.

        Raises:
            UnsafeAnswerError: the prompt is flagged and ``on_flagged`` is ``raise``, or the agent asks for an answer
                that was withheld over and over.
        """
        self._refuse_to_loop()
        if (ended := await self._look_over()) is not None:
            return ended
        if not self.check_prompt:
            return None
        ledger = self.settings.ledger("prompt", "prompt")
        flagged = [message for message in self._new_prompts() if not await ledger.passes(material(message).texts)]
        if not flagged:
            return None
        handover = Handover("raise" if self.settings.handover.action == "raise" else "block")
        stand_in = StandIn(handover, ledger, self.request.messages, "prompt", model_name(self.request.model))
        answer = await stand_in.message()
        # Where the moderator is down, the prompt may be as harmless as any: it stays in the state for the next try.
        replaced = [] if ledger.error else [HumanMessage(answer.text, id=message.id) for message in flagged]
        return self._ended([answer], replaced)

    async def checked(self, response: Any) -> Response:
        """The response, with any message replaced that did not come through the guard and does not pass it now."""
        model_response: ModelResponse[Any] = _model_response(response)
        messages = [await self._checked_message(message) for message in model_response.result]
        self._remember()
        if any(new is not old for new, old in zip(messages, model_response.result, strict=True)):
            return self._ended(messages)
        if self._withheld(messages) and self.request.response_format:
            return self._ended(messages)
        if self._updates:
            return ExtendedModelResponse(model_response, Command(update={"messages": self._updates}))
        return model_response

    def without_structure(self, error: StructuredOutputError) -> Response:
        """A stand-in has no structure, which is no fault of the model: the agent ends with it.

        Raises:
            StructuredOutputError: the model's own message could not be parsed.
        """
        if not self._withheld([error.ai_message]):
            raise error
        return self._ended([error.ai_message])

    def _remember(self) -> None:
        """What the model said was checked in answer to the last question, and need not be again."""
        prompt = last_human_text(self.request.messages)
        for ledger in self._books.ledgers:
            self.settings.approvals.add(ledger.approved, prompt)

    async def _checked_message(self, message: BaseMessage) -> BaseMessage:
        if not isinstance(message, AIMessage) or self._books.approved(material(message).texts):
            return message
        asked = self.request.messages
        return await checked_message(self.settings, message, asked, last_human_text(asked), self.settings.handover)

    async def _look_over(self) -> Response | None:
        """What the model is about to read, checked; where that was the run's last word, the run ends with it."""
        old, stored = self.request.messages, self.request.state["messages"]
        new = await self.whole_run.checked(old)
        if all(now is was for was, now in zip(old, new, strict=True)):
            return None
        self._updates = updates(old, new, stored)
        self.request = self.request.override(messages=[message for message in new if message is not None])  # type: ignore[misc]
        last = self.request.messages[-1] if self.request.messages else None
        if not isinstance(last, AIMessage) or not any(last is one for one in self._updates):
            return None
        self._updates = [one for one in self._updates if one is not last]
        return self._ended([last])

    def _new_prompts(self) -> list[HumanMessage]:
        """What the user has written since the last answer."""
        new = list[HumanMessage]()
        for message in reversed(self.request.messages):
            if isinstance(message, AIMessage):
                break
            if isinstance(message, HumanMessage) and material(message).texts:
                new.insert(0, message)
        return new

    def _ended(self, answers: Sequence[BaseMessage], prompts: Sequence[HumanMessage] = ()) -> Response:
        """The response that ends the agent's run: an agent with a response format would ask for one again."""
        written = [*self._updates, *prompts]
        update: dict[str, Any] = {"messages": written} if written else {}
        if self.request.response_format:
            update["jump_to"] = "end"
        response: ModelResponse[Any] = ModelResponse(result=list(answers))
        return ExtendedModelResponse(response, Command(update=update)) if update else response

    def _refuse_to_loop(self) -> None:
        """Middleware after the model may swallow the jump to the end; a withheld answer is not asked for again."""
        if self.request.response_format and self._withheld(self.request.messages[-1:]):
            raise UnsafeAnswerError("the answer was withheld, so there is no structured response; catch this error")

    @staticmethod
    def _withheld(messages: Sequence[BaseMessage]) -> bool:
        """Whether another text stands in for what the model had said."""
        traces = [message.response_metadata.get("tta", {}) for message in messages]
        return any(trace.get("outcome") == "blocked" or "handed_over" in trace for trace in traces)


def _model_response(response: Any) -> ModelResponse[Any]:
    if isinstance(response, AIMessage):
        return ModelResponse(result=[response])
    return response.model_response if isinstance(response, ExtendedModelResponse) else response
