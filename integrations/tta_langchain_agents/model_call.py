"""One model call of an agent behind the guard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from langchain.agents.middleware import ModelRequest, ModelResponse
from langchain.agents.middleware.types import ExtendedModelResponse
from langchain.agents.structured_output import StructuredOutputError
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langgraph.types import Command

from tta_langchain_agents.chat_model import GuardedChatModel, guards_itself
from tta_langchain_agents.content import material
from tta_langchain_agents.handover import Handover, OnFlagged, Replacement, StandIn
from tta_langchain_agents.inner import model_name
from tta_langchain_agents.ledger import Books, Ledger
from tta_middleware.chat_model import TTAChatModel
from tta_middleware.chat_model.runtime import Runtime
from tta_middleware.config import Windows
from tta_middleware.errors import ConfigurationError, UnsafeAnswerError
from tta_middleware.policy import Stage, StagePolicies
from tta_middleware.protocols import Moderator
from tta_middleware.registry import MODERATORS, check_known

Response = ModelResponse[Any] | ExtendedModelResponse[Any]


@dataclass(slots=True)
class Settings:
    """What a middleware was given, checked, and the moderator that its calls share.

    Raises:
        ConfigurationError: a value is unknown or does not fit another.
    """

    moderator: str | Moderator
    policy: Any
    on_flagged: OnFlagged | None
    repair_model: TTAChatModel | None
    replacement: Replacement | None
    release: Literal["window", "end"] | Windows
    runtime: Runtime = field(default_factory=Runtime)
    handover: Handover = field(init=False)
    policies: StagePolicies = field(init=False)

    def __post_init__(self) -> None:
        self.handover = Handover.of(self.on_flagged, self.repair_model, self.replacement)
        self.policies = StagePolicies.of(self.policy)
        if isinstance(self.moderator, str):
            check_known(MODERATORS, "moderator", self.moderator)
        if self.release not in ("window", "end") and not isinstance(self.release, Windows):
            raise ConfigurationError(f"release is 'window', 'end' or Windows, not {self.release!r:.40}")

    def ledger(self, stage: Stage) -> Ledger:
        """New books for one stage of one call."""
        moderator = self.runtime.moderator(self.moderator)
        return Ledger(moderator, self.policies.at(stage).with_default(moderator.default_threshold))

    def guard(self, model: BaseChatModel, books: Books) -> BaseChatModel:
        """The model behind the guard, if it does not guard itself."""
        if guards_itself(model):
            return model
        return GuardedChatModel(
            inner=model,
            moderator=self.runtime.moderator(self.moderator),
            policy=self.policies,
            on_flagged=self.handover.action,
            repair_model=self.repair_model,
            replacement=self.replacement,
            release=self.release,
            runtime=self.runtime,
            books=books,
        )


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

    settings: Settings
    request: ModelRequest[Any]
    check_prompt: bool = False
    _books: Books = field(default_factory=Books)

    def guarded(self) -> ModelRequest[Any]:
        """The request with its model behind the guard."""
        return GuardedRequest.of(self.request, lambda model: self.settings.guard(model, self._books))

    async def refusal(self) -> Response | None:
        """The answer to a flagged prompt, where prompts are checked; the model is not called then.

        Raises:
            UnsafeAnswerError: the prompt is flagged and ``on_flagged`` is ``raise``, or the agent asks for an answer
                that was withheld over and over.
        """
        self._refuse_to_loop()
        if not self.check_prompt:
            return None
        ledger = self.settings.ledger("prompt")
        flagged = [message for message in self._new_prompts() if not await ledger.passes([message.text])]
        if not flagged:
            return None
        handover = Handover("raise" if self.settings.handover.action == "raise" else "block")
        stand_in = StandIn(handover, ledger, self.request.messages, "prompt", model_name(self.request.model))
        answer = await stand_in.message()
        # Where the moderator is down, the prompt may be as harmless as any: it stays in the state for the next try.
        replaced = [] if ledger.error else [HumanMessage(answer.text, id=message.id) for message in flagged]
        return self._ended([answer], replaced)

    async def settle(self, response: Any) -> Response:
        """The response, with any message replaced that did not come through the guard and does not pass it now."""
        model_response: ModelResponse[Any] = _model_response(response)
        messages = [await self._settled(message) for message in model_response.result]
        if all(new is old for new, old in zip(messages, model_response.result, strict=True)):
            return self._ended(messages) if self._withheld(messages) and self.request.response_format else response
        return self._ended(messages)

    def without_structure(self, error: StructuredOutputError) -> Response:
        """A stand-in has no structure, which is no fault of the model: the agent ends with it.

        Raises:
            StructuredOutputError: the model's own message could not be parsed.
        """
        if not self._withheld([error.ai_message]):
            raise error
        return self._ended([error.ai_message])

    async def _settled(self, message: BaseMessage) -> BaseMessage:
        if not isinstance(message, AIMessage) or self._is_guarded(message):
            return message
        ledger = self.settings.ledger("output")
        for part, texts in material(message):
            if not await ledger.passes(texts):
                stand_in = StandIn(self.settings.handover, ledger, self.request.messages, part)
                return (await stand_in.message()).model_copy(update={"id": message.id, "name": message.name})
        return message

    def _is_guarded(self, message: AIMessage) -> bool:
        """It came from here, or from a model that guards itself."""
        if not self._books.ledgers:
            return "tta" in message.response_metadata
        return self._books.approved(material(message).texts)

    def _new_prompts(self) -> list[HumanMessage]:
        """What the user has written since the last answer."""
        new = list[HumanMessage]()
        for message in reversed(self.request.messages):
            if isinstance(message, AIMessage):
                break
            if isinstance(message, HumanMessage) and message.text.strip():
                new.insert(0, message)
        return new

    def _ended(self, answers: Sequence[BaseMessage], prompts: Sequence[HumanMessage] = ()) -> Response:
        """The response that ends the agent's run: an agent with a response format would ask for one again."""
        update: dict[str, Any] = {"messages": list(prompts)} if prompts else {}
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
