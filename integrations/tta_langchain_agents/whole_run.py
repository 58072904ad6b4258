"""The conversation as the state holds it: every message in it is checked once, whoever wrote it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import anyio
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, RemoveMessage, ToolMessage

from tta_langchain_agents.content import material
from tta_langchain_agents.handover import Handover
from tta_langchain_agents.settings import MiddlewareSettings, checked_message
from tta_langchain_agents.tools import ResultChecks, ResultGuard
from tta_middleware.aio.streams import first_error

Checked: TypeAlias = list[BaseMessage | None]
"""A conversation in which flagged messages are replaced; None where one was taken out."""


@dataclass(frozen=True, slots=True)
class _Found:
    """A message that was not checked yet, and the question that it answers."""

    at: int
    message: BaseMessage
    texts: list[str]
    prompt: str | None


@dataclass(slots=True)
class WholeRun:
    """One look at the conversation of an agent; the tasks of :meth:`checked` each write to places of their own.

    Attributes:
        tool_results: whether what tools gave back is looked at, too.
        history: whether messages before the user's last one are.
    """

    settings: MiddlewareSettings
    checks: ResultChecks
    tool_results: bool = True
    history: bool = True
    _messages: Sequence[BaseMessage] = ()
    _turn: int = 0
    _checked: Checked = field(default_factory=list)

    async def checked(self, messages: Sequence[BaseMessage]) -> Checked:
        """The conversation as it may be shown; the same objects where nothing is flagged.

        Raises:
            UnsafeAnswerError: a message since the user's last one is flagged, and is to raise.
        """
        self._messages, self._checked = messages, list(messages)
        self._turn = max((at for at, one in enumerate(messages) if _is_users(one)), default=0)
        groups = defaultdict[str | None, list[_Found]](list)
        for found in self._unknown():
            groups[found.prompt].append(found)
        try:
            async with anyio.create_task_group() as tasks:
                for group in groups.values():
                    tasks.start_soon(self._check_group, group)
        except BaseExceptionGroup as errors:
            raise first_error(errors) from None
        self._take_out_results_of_no_call()
        return self._checked

    def _unknown(self) -> Iterator[_Found]:
        prompt: str | None = None
        for at, message in enumerate(self._messages):
            looked_at = self.history or at >= self._turn
            if isinstance(message, AIMessage):
                found = _Found(at, message, material(message).texts, prompt)
            elif (self.tool_results and isinstance(message, ToolMessage)) or _is_middlewares(message):
                found = _Found(at, message, self._guard(message).texts(message), None)
            else:
                found = None
            if found and looked_at and not self.settings.approvals.hold(found.texts, found.prompt):
                yield found
            if isinstance(message, HumanMessage):
                prompt = message.text

    async def _check_group(self, group: list[_Found]) -> None:
        """All texts that answer one question go in one request; only if they do not pass, message by message."""
        ledger, prompt = self.settings.ledger("output"), group[0].prompt
        if await ledger.passes([text for found in group for text in found.texts], prompt):
            self.settings.approvals.add(ledger.approved, prompt)
            return
        for found in group:
            # What was there before the user's last message has been seen: a moderator that is down does not erase it.
            if ledger.error is None or found.at >= self._turn:
                self._checked[found.at] = await self._checked_message(found)

    async def _checked_message(self, found: _Found) -> BaseMessage:
        if isinstance(found.message, AIMessage):
            current = found.at >= self._turn
            handover = self.settings.handover if current else Handover("block")
            return await checked_message(
                self.settings, found.message, self._messages[: found.at], found.prompt, handover
            )
        message: BaseMessage = await self._guard(found.message, found.prompt).checked(found.message)
        return message

    def _guard(self, message: BaseMessage, prompt: str | None = None) -> ResultGuard:
        ledger, checks = self.settings.ledger("output"), self.checks
        if not isinstance(message, ToolMessage):
            checks = replace(checks, notice=ledger.policy.notice_for(prompt or message.text))
        return ResultGuard(ledger, checks, self.settings.approvals, message.name or "")

    def _take_out_results_of_no_call(self) -> None:
        """A provider refuses results of calls that it cannot see; a withheld message's calls went with it."""
        gone = set[str | None]()
        for old, new in zip(self._messages, self._checked, strict=True):
            if new is not old and isinstance(old, AIMessage):
                gone |= {call["id"] for call in [*old.tool_calls, *old.invalid_tool_calls]}
        for at, message in enumerate(self._messages):
            if isinstance(message, ToolMessage) and message.tool_call_id in gone:
                self._checked[at] = None


def updates(old: Sequence[BaseMessage], new: Checked, stored: Sequence[BaseMessage]) -> list[BaseMessage]:
    """What makes the stored messages those that were checked; a message that is not stored needs no update."""
    ids = {message.id for message in stored}
    changed = [(was, now) for was, now in zip(old, new, strict=True) if now is not was and was.id in ids]
    return [RemoveMessage(id=str(was.id)) if now is None else now for was, now in changed]


def _is_middlewares(message: BaseMessage) -> bool:
    """LangChain's own middleware marks what it writes in the user's name, such as a model's summary."""
    return isinstance(message, HumanMessage) and bool(message.additional_kwargs.get("lc_source"))


def _is_users(message: Any) -> bool:
    return isinstance(message, HumanMessage) and not _is_middlewares(message)
