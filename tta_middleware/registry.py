"""Turns what users write (``model="smollm2"``, ``moderator="local"``, ``method="tsa"``) into parts.

Extension points are entry points: a package that declares one in the group ``tta_middleware.engines``,
``tta_middleware.moderators`` or ``tta_middleware.methods`` is found by name. Nothing is
imported before it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, entry_points
from inspect import Parameter, iscoroutinefunction, signature
from typing import Any, cast

from tta_middleware.errors import ConfigurationError
from tta_middleware.methods.base import Method
from tta_middleware.policy import StagePolicies
from tta_middleware.policy.coverage import categories_of, check_scored, enforced
from tta_middleware.protocols import Engine, Moderator

ENGINES = "tta_middleware.engines"
MODERATORS = "tta_middleware.moderators"
METHODS = "tta_middleware.methods"

JUDGES = "guard:"
"""What the name of a moderator begins with that is a model; what follows is the model's reference."""


def names(group: str) -> list[str]:
    """The names that are declared in an entry-point group, sorted."""
    return sorted({entry.name for entry in entry_points(group=group)})


def find(group: str, name: str) -> EntryPoint | None:
    """The entry point of that name in a group; reads the metadata of what is installed, some milliseconds."""
    return next(iter(entry_points(group=group, name=name)), None)


def check_known(group: str, kind: str, name: str) -> EntryPoint:
    """The entry point of that name, which is not loaded yet.

    Raises:
        ConfigurationError: the group has no such name.
    """
    found = _judge(name) if group == MODERATORS else None
    found = found or find(group, name)
    if found is None:
        raise ConfigurationError(f"unknown {kind} {name!r}; known are {', '.join(names(group)) or 'none'}")
    return found


def _judge(name: str) -> EntryPoint | None:
    """What ``guard:MODEL`` stands for: a model of this process that judges."""
    if not name.removeprefix(JUDGES) or not name.startswith(JUDGES):
        return None
    return EntryPoint(name, "tta_middleware.moderation.llm_judge:LLMJudge", MODERATORS)


def _load(group: str, kind: str, name: str) -> Callable[..., Any]:
    return cast(Callable[..., Any], check_known(group, kind, name).load())


def resolve_engine(model: str | Engine, **options: Any) -> Engine:
    """An engine for a model reference.

    ``"name:reference"`` uses the engine that is declared under ``name``; any other string goes to the
    ``transformers`` engine, which knows ``smollm2``, local folders and Hugging Face ids. ``options`` go to the engine's
    constructor; the chat model gives ``device``, ``dtype`` and ``allow_download``.

    Raises:
        ConfigurationError: the model is neither a string nor an engine, or the engine has no such option.
    """
    if isinstance(model, str):
        check_options(model, options)
        name, reference = _engine(model)
        return cast(Engine, _load(ENGINES, "engine", name)(reference, **options))
    if isinstance(model, Engine):
        return model
    raise ConfigurationError(f"a model is a name, a folder or an Engine, not {_described(model)}")


def _described(model: Any) -> str:
    """What somebody gave for a model, and what to give instead where that is known."""
    kind = type(model).__name__
    if callable(getattr(model, "generate", None)) and hasattr(model, "config"):
        return f"a {kind}, which lacks its tokenizer; save_pretrained both into one folder and give that"
    if callable(getattr(model, "ainvoke", None)):
        return f"a {kind}; for a LangChain chat model there is tta_langchain_agents.GuardedChatModel"
    return f"{kind!r}, which lacks members of tta_middleware.protocols.Engine"


def check_options(model: str, options: Iterable[str]) -> None:
    """Whether the engine of a model reference takes options of these names; the engine is not made.

    Raises:
        ConfigurationError: it has no such option.
    """
    name, _ = _engine(model)
    taken = signature(_load(ENGINES, "engine", name)).parameters
    unknown = sorted(set(options) - set(taken))
    if unknown and Parameter.VAR_KEYWORD not in {parameter.kind for parameter in taken.values()}:
        raise ConfigurationError(f"the engine {name!r} has no {' and no '.join(unknown)} to set; leave it out")


def _engine(model: str) -> tuple[str, str]:
    """An engine's name and what it is given."""
    name, colon, reference = model.partition(":")
    return (name, reference) if colon and name in names(ENGINES) else ("transformers", model)


def resolve_moderator(moderator: str | Moderator | Any) -> Moderator:
    """A moderator for a name such as ``local`` or ``openai``, or from any object with a ``moderate`` of texts.

    ``guard:MODEL`` is a model of this process that is asked (:class:`~tta_middleware.moderation.llm_judge.LLMJudge`);
    its reference is read as :func:`resolve_engine` does, and it is loaded with the first text.

    What an object lacks is filled in: see :class:`~tta_middleware.moderation.adapters.plain.PlainModerator`.

    Raises:
        ConfigurationError: an unknown name, or an object without ``moderate`` (a judge, say).
    """
    if isinstance(moderator, str):
        made = _load(MODERATORS, "moderator", moderator)
        if moderator.startswith(JUDGES):
            engine = resolve_engine(moderator.removeprefix(JUDGES))
            return cast(Moderator, made(engine, name=moderator, closes=True))
        return cast(Moderator, made())
    if isinstance(moderator, type) or not callable(getattr(moderator, "moderate", None)):
        raise ConfigurationError(
            f"a moderator is a name, or an object with moderate(texts) that gives a Verdict for each text; "
            f"{getattr(moderator, '__name__', type(moderator).__name__)} is neither"
        )
    if isinstance(moderator, Moderator) and iscoroutinefunction(moderator.moderate):
        return moderator
    from tta_middleware.moderation.adapters.plain import PlainModerator

    return PlainModerator(moderator)


def check_policies(moderator: str | Moderator, policies: StagePolicies) -> None:
    """Whether a moderator, or the one of that name, scores what ``policies`` enforce; none is made for it.

    Raises:
        ConfigurationError: it declares what it scores, and something is missing.
    """
    if not enforced(policies):
        return
    if isinstance(moderator, str):
        check_scored(policies, categories_of(_load(MODERATORS, "moderator", moderator)), moderator)
    else:
        found = resolve_moderator(moderator)
        check_scored(policies, categories_of(found), found.name)


def resolve_method(method: str | Method | None) -> Method | None:
    """A search method for a name, or the method itself; ``none`` and None mean that flagged answers are blocked.

    Raises:
        ConfigurationError: an unknown name, or an object without the Method protocol.
    """
    if method is None or method == "none":
        return None
    if isinstance(method, str):
        return cast(Method, _load(METHODS, "method", method)())
    if isinstance(method, Method):
        return method
    raise ConfigurationError(f"a method is a name or has name and build; {type(method).__name__} has not")
