"""The proof of the guarantee: everything that was scored against everything that left.

    with Auditor():
        answer = await guard.answer(messages)

While an auditor is open it listens at two places. At the moderators: every text that was scored, and its verdict. At
the ways out: what guards, ``moderated`` and LangChain's surfaces gave to whoever called them, when they gave it. It
holds one against the other by rules of its own (:mod:`tta_middleware.testing.audit_rules`) and raises
:class:`AuditError` at the end if anything left that no passing verdict covers. What it listens to is called as before,
in the same order and in the same task. One auditor may be open at a time.

Moderators are heard at the object that a guard was given: what a cache or a retry under it does is its own affair.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, Self

from tta_middleware.config import Windows
from tta_middleware.guard import moderated as streaming
from tta_middleware.guard.context import Conversation
from tta_middleware.guard.events import StreamEvent
from tta_middleware.guard.guard import Guard
from tta_middleware.guard.settings import Repair
from tta_middleware.policy import Policy, StagePolicies
from tta_middleware.protocols import Moderator
from tta_middleware.testing import audit_server
from tta_middleware.testing.audit_request import AuditedRequest, AuditError, Hearing, Terms, heard
from tta_middleware.types import Message

__all__ = ["AuditError", "Auditor"]

# Names of modules, for all auditors of this process, of which one at a time is open. To look through thousands of them
# anew would take each test some milliseconds.
_looked_at: set[str] = set()
_with_moderated: set[str] = set()


class Auditor(Hearing):
    """Listens from ``__enter__`` to ``__exit__``, which raises what was found unless something else was raised."""

    def __enter__(self) -> Self:
        super().__enter__()
        _listen_to_guards(self)
        _listen_to_moderated(self)
        audit_server.listen(self)
        if "tta_middleware.chat_model.model" in sys.modules:
            from tta_middleware.testing.audit_langchain import listen

            listen(self)
        return self


@dataclass(frozen=True, slots=True)
class _Promise:
    """What a guard was made with."""

    policies: StagePolicies
    windows: Windows
    prompt_check: str
    speaks: bool
    moderator: Moderator

    def terms(self, messages: Sequence[Message]) -> Terms:
        prompts: Mapping[str, tuple[str, ...]] = {
            "user": (Conversation(messages).user_text,),
            "all": tuple(message.content for message in messages if message.content),
        }
        asked = prompts.get(self.prompt_check, ())
        terms = Terms.of(self.policies, context=self.windows.context, prompts=asked, speaks=self.speaks)
        return terms.taken_by(self.moderator, self.windows.largest)


def _listen_to_guards(auditor: Hearing) -> None:
    auditor.replace(Guard, "__init__", _made)
    auditor.replace(Guard, "stream", _streamed)
    auditor.replace(Guard, "answer", _answered)
    auditor.replace(Guard, "report", _answered)


def _made(auditor: Hearing, original: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(original)

    @wraps(original)
    def init(self: Guard, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        _register(auditor, self, **given.arguments)

    return init


def _register(
    auditor: Hearing,
    guard: Guard,
    *,
    moderator: Moderator,
    policy: Any = None,
    repair: Repair | None = None,
    windows: Windows | None = None,
    prompt_check: str = "off",
    **_: Any,
) -> None:
    policies = StagePolicies.of(policy).with_default(moderator.default_threshold)
    speaks = callable((repair or Repair()).fallback)
    auditor.keep_terms(guard, _Promise(policies, windows or Windows(), prompt_check, speaks, moderator))
    auditor.hear(moderator)


def _terms(auditor: Hearing, guard: Guard, messages: Sequence[Message]) -> Terms:
    """Of a guard that is older than the auditor, by what it holds."""
    if auditor.terms_of(guard) is None:
        _register(
            auditor,
            guard,
            moderator=guard._moderator,
            policy=guard._policies,
            repair=guard._repair,
            windows=guard._windows,
            prompt_check=guard._prompt_check,
        )
    promise: _Promise = auditor.terms_of(guard)
    return promise.terms(messages)


def _streamed(auditor: Hearing, original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def stream(
        self: Guard, messages: Sequence[Message], *args: Any, **kwargs: Any
    ) -> AsyncGenerator[StreamEvent, None]:
        whole = kwargs.get("release") == "end"
        request = auditor.request("Guard.stream", _terms(auditor, self, messages), whole=whole)
        return heard(request, original(self, messages, *args, **kwargs), request.event)

    return stream


def _answered(auditor: Hearing, original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    async def answered(self: Guard, messages: Sequence[Message], *args: Any, **kwargs: Any) -> Any:
        label = f"Guard.{original.__name__}"
        request = auditor.request(label, _terms(auditor, self, messages), whole=True)
        with request.current():
            found = await original(self, messages, *args, **kwargs)
        request.answer(getattr(found, "answer", found))
        return found

    return answered


def _listen_to_moderated(auditor: Hearing) -> None:
    """Wherever the function was imported to by its name."""
    original = streaming.moderated
    for name in sys.modules.keys() - _looked_at:
        _look_at(name)
    for name in _with_moderated:
        if getattr(sys.modules.get(name), "moderated", None) is original:
            auditor.replace(sys.modules[name], "moderated", _moderated)


def _look_at(name: str) -> None:
    """Whether a module has something of that name; one that is still being imported is looked at again."""
    module = sys.modules.get(name)
    if "moderated" in getattr(module, "__dict__", {}):
        _with_moderated.add(name)
    if not getattr(getattr(module, "__spec__", None), "_initializing", False):
        _looked_at.add(name)


def _thinking(request: AuditedRequest, release: Callable[[str], Awaitable[None]]) -> Callable[[str], Awaitable[None]]:
    async def think(text: str) -> None:
        request.think(text)
        await release(text)

    return think


def _moderated(auditor: Hearing, original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def moderated(
        source: AsyncIterable[Any], moderator: Any, policy: Policy | None = None, **more: Any
    ) -> AsyncGenerator[str, None]:
        windows = more.get("windows") or Windows()
        if not hasattr(moderator, "default_threshold") or not isinstance(windows, Windows):
            refused: AsyncGenerator[str, None] = original(source, moderator, policy, **more)
            return refused
        # A ledger of an agent's is no moderator but keeps books on one, which is heard itself.
        auditor.hear(getattr(moderator, "moderator", moderator))
        policies = StagePolicies.of(policy).with_default(moderator.default_threshold)
        if (thoughts := more.get("thoughts")) is not None:
            auditor.hear(getattr(thoughts.moderator, "moderator", thoughts.moderator))
            theirs = thoughts.policy.with_default(moderator.default_threshold)
            policies = policies.model_copy(update={"reasoning": theirs})
        terms = Terms.of(policies, context=windows.context).taken_by(moderator, windows.largest)
        # What goes on from what has left already is another model's.
        label = "moderated, behind" if more.get("behind") else "moderated"
        request = auditor.request(label, terms, whole=bool(more.get("hold")))
        if thoughts is not None:
            more["thoughts"] = replace(thoughts, release=_thinking(request, thoughts.release))
        return heard(request, original(source, moderator, policy, **more), request.piece)

    return moderated
