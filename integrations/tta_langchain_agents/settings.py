"""What a middleware was given, and what its calls share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage

from tta_langchain_agents.chat_model import GuardedChatModel, guards_itself
from tta_langchain_agents.content import material
from tta_langchain_agents.handover import Handover, OnFlagged, Replacement, StandIn
from tta_langchain_agents.inner import base_model, handlers, observed
from tta_langchain_agents.ledger import Approvals, Books, Witness
from tta_middleware.assembly import Runtime
from tta_middleware.chat_model import TTAChatModel
from tta_middleware.chat_model.quiet import quiet as within_a_guard
from tta_middleware.config import Windows
from tta_middleware.errors import ConfigurationError
from tta_middleware.guard.ledger import Ledger
from tta_middleware.policy import Stage, StagePolicies
from tta_middleware.protocols import Moderator
from tta_middleware.registry import check_moderator, check_policies
from tta_middleware.types import Subject


@dataclass(slots=True)
class MiddlewareSettings:
    """What a middleware was given, checked, the moderator that its calls share, and what they have approved.

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
    approvals: Approvals = field(default_factory=Approvals)
    handover: Handover = field(init=False)
    policies: StagePolicies = field(init=False)

    def __deepcopy__(self, memo: Any) -> MiddlewareSettings:
        """Shared by the copies of a middleware: nothing but what they may share changes in it."""
        return self

    def __post_init__(self) -> None:
        self.handover = Handover.of(self.on_flagged, self.repair_model, self.replacement)
        self.policies = StagePolicies.of(self.policy)
        check_moderator(self.moderator, None)
        check_policies(self.moderator, self.policies)
        if self.release not in ("window", "end") and not isinstance(self.release, Windows):
            raise ConfigurationError(f"release is 'window', 'end' or Windows, not {self.release!r:.40}")

    def ledger(self, stage: Stage, subject: Subject = "answer") -> Ledger:
        """New books for one stage of one call."""
        moderator = self.runtime.moderator(self.moderator)
        policy = self.policies.at(stage).with_default(moderator.default_threshold)
        return Ledger(moderator, policy, subject, around=within_a_guard)

    def guard(self, model: BaseChatModel, books: Books) -> BaseChatModel:
        """The model behind the guard, if it does not guard itself."""
        if guards_itself(model):
            return model if _tells(model, books) else self._witnessed(model, books)
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

    def _witnessed(self, model: BaseChatModel, books: Books) -> BaseChatModel:
        """A model that guards itself, telling the books what it said; what others make of that is not approved."""
        witness = Witness(self.ledger("output"))
        books.ledgers.append(witness.ledger)
        return observed(model, witness)  # type: ignore[no-any-return]


def _tells(model: BaseChatModel, books: Books) -> bool:
    """Whether a model that guards itself tells these books already."""
    base = base_model(model)
    if isinstance(base, GuardedChatModel) and base.books is books:
        return True
    return any(isinstance(one, Witness) and one.ledger in books.ledgers for one in handlers(base.callbacks))


async def checked_message(
    settings: MiddlewareSettings,
    message: AIMessage,
    asked: Sequence[BaseMessage],
    prompt: str | None,
    handover: Handover,
) -> BaseMessage:
    """A model's message, or what stands in for it under its id.

    Raises:
        UnsafeAnswerError: it is flagged, and is to raise.
    """
    ledger = settings.ledger("output")
    for part, texts in material(message):
        if not await ledger.passes(texts, prompt):
            stand_in = await StandIn(handover, ledger, asked, part, usage=message.usage_metadata).message()
            settings.approvals.add(material(stand_in).texts, prompt)
            return stand_in.model_copy(update={"id": message.id, "name": message.name})
    settings.approvals.add(ledger.approved, prompt)
    return message
