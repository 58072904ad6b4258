"""Turns what users write (``model="smollm2"``, ``moderator="local"``, ``method="tsa"``) into parts.

Extension points are entry points: a package that declares one in the group ``tta_middleware.engines``,
``tta_middleware.moderators`` or ``tta_middleware.methods`` is found by name. Nothing is
imported before it is asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, cast

from tta_middleware.errors import ConfigurationError, TTAError
from tta_middleware.methods.base import Method
from tta_middleware.policy import STAGES, StagePolicies
from tta_middleware.policy.coverage import categories_of, check_rules, check_scored, enforced, reads_rules
from tta_middleware.protocols import Engine, Moderator

if TYPE_CHECKING:
    from tta_middleware.moderation.llm_judge import JudgeCalibration

ENGINES = "tta_middleware.engines"
MODERATORS = "tta_middleware.moderators"
METHODS = "tta_middleware.methods"

JUDGES = "guard:"
"""What the name of a moderator begins with that is a model; what follows is the model's reference."""

OWN = "self"
"""The moderator that is the model which answers."""

LOCAL = "local"
"""The moderator that needs no model."""

CASCADE = "cascade"
"""The moderator that asks ``local`` first and, where that is not sure, the model which answers; ``cascade:MODEL`` asks
another model instead."""

BESIDE = "+"
"""Between the names of moderators that are asked side by side; each category's highest score counts."""

CalibrationOf: TypeAlias = Callable[[str], "JudgeCalibration | None"]
"""From a model's reference to what was measured of it as a judge; None where nothing was."""

_BESIDES: Mapping[str, tuple[str, ...]] = {
    ENGINES: (),
    MODERATORS: (OWN, f"{JUDGES}MODEL", CASCADE, f"{CASCADE}:MODEL", f"{OWN}{BESIDE}{LOCAL}"),
    METHODS: ("none",),
}
"""What is understood beside the names of a group."""

_ASKED = ("token_ids", "next_token_logprobs")
_LLM_JUDGE = "tta_middleware.moderation.llm_judge:LLMJudge"
_CASCADE = "tta_middleware.moderation.cascade:Cascade"
_OWN = (OWN, CASCADE)


def names(group: str) -> list[str]:
    """The names that are declared in an entry-point group, sorted."""
    return sorted({entry.name for entry in entry_points(group=group)})


def find(group: str, name: str) -> EntryPoint | None:
    """The entry point of that name in a group.

    The first time that reads the metadata of all that is installed, some milliseconds: too long for each of the chat
    models that ``configurable_fields`` makes, one per call. What is not found may be installed later.
    """
    key = (group, name, *sys.path)
    if key not in _found:
        for entry in entry_points(group=group, name=name):
            _found.setdefault(key, entry)
    return _found.get(key)


_found: dict[tuple[str, ...], EntryPoint] = {}
"""Entry points by group, name and where is looked. Threads may write the same ones twice; none is ever taken out."""


def check_known(group: str, kind: str, name: str) -> EntryPoint:
    """The entry point of that name, which is not loaded yet.

    Raises:
        ConfigurationError: the group has no such name.
    """
    found = find(group, name)
    if found is None:
        raise ConfigurationError(f"unknown {kind} {name!r}; known are {', '.join([*names(group), *_BESIDES[group]])}")
    return found


def moderators_in(name: str) -> list[str]:
    """The moderators that a name asks for side by side (``self+local``), one in most cases.

    Raises:
        ConfigurationError: one of them is unknown.
    """
    found: list[str] = []
    for part in name.split(BESIDE):
        if not _is_moderator(part) and found and judging_model(found[-1]) is not None:
            found[-1] += BESIDE + part  # of the folder's name
        else:
            found.append(part)
    for part in found:
        if not _is_moderator(part):
            check_known(MODERATORS, "moderator", part)
    return found


def _is_moderator(name: str) -> bool:
    return judging_model(name) is not None or name in _OWN or find(MODERATORS, name) is not None


def judging_model(name: str) -> str | None:
    """The reference of the model that ``guard:MODEL`` or ``cascade:MODEL`` asks; None for other names."""
    for beginning in (JUDGES, f"{CASCADE}:"):
        if name.startswith(beginning) and name != beginning:
            return name.removeprefix(beginning)
    return None


def asks_own(moderator: str) -> bool:
    """Whether a moderator of that name asks the model that answers.

    Raises:
        ConfigurationError: it is unknown.
    """
    return any(name in _OWN for name in moderators_in(moderator))


def check_moderator(moderator: str | Moderator, model: str | Engine | None) -> None:
    """Whether there is such a moderator beside ``model``, which may have to judge; none is made.

    Args:
        model: what answers; None where that is no engine of this process.

    Raises:
        ConfigurationError: the object is no moderator, or the name is unknown, or asks ``model`` to judge, which it
            cannot.
    """
    if not isinstance(moderator, str):
        resolve_moderator(moderator)
        return
    if not asks_own(moderator):
        return
    if model is None:
        raise _nothing_to_ask(moderator)
    asked: Any = _load(ENGINES, "engine", _engine(model)[0]) if isinstance(model, str) else model
    if missing := [name for name in _ASKED if not hasattr(asked, name)]:
        named = asked.__name__ if isinstance(asked, type) else type(asked).__name__
        raise ConfigurationError(
            f"moderator {moderator!r} asks the model that answers, and {named} has no {' and no '.join(missing)}; "
            f"say {JUDGES}MODEL or {CASCADE}:MODEL, which asks a model of this process"
        )


def _nothing_to_ask(moderator: str) -> ConfigurationError:
    return ConfigurationError(
        f"moderator {moderator!r} asks the model that answers, and here none of this process's engines does; "
        f"say {JUDGES}MODEL or {CASCADE}:MODEL, which asks a model of this process"
    )


def _load(group: str, kind: str, name: str) -> Callable[..., Any]:
    if group == MODERATORS and (name in _OWN or judging_model(name) is not None):
        made = _CASCADE if name.startswith(CASCADE) else _LLM_JUDGE
        return cast(Callable[..., Any], EntryPoint(name, made, group).load())
    return _imported(check_known(group, kind, name), kind)


def _imported(entry: EntryPoint, kind: str) -> Callable[..., Any]:
    """What an entry point names.

    Raises:
        ConfigurationError: its module, or the name in it, cannot be had.
        MissingExtraError: as that module raises it.
    """
    try:
        found = entry.load()
    except TTAError:
        raise
    except Exception as error:
        raise ConfigurationError(
            f"the {kind} {entry.name!r} is {entry.value!r}, which cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not callable(found):
        raise ConfigurationError(f"the {kind} {entry.name!r} is {entry.value!r}, which is no class and no function")
    return cast(Callable[..., Any], found)


def _called(kind: str, name: str, made: Callable[..., Any], *given: Any, **options: Any) -> Any:
    """The part that a class or a function of an entry point makes.

    Raises:
        ConfigurationError: it takes other arguments; whatever else it raises is its own affair.
    """
    try:
        signature(made).bind(*given, **options)
    except ValueError:  # one of C, which has none to tell
        pass
    except TypeError as error:
        taken = "that takes the text behind the colon" if given else "without arguments"
        raise ConfigurationError(
            f"the {kind} {name!r} cannot be made from its name: {error}; give an object that you have made, or have "
            f"the entry point name a function {taken}"
        ) from None
    return made(*given, **options)


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
        engine = _called("engine", name, _load(ENGINES, "engine", name), reference, **options)
        if not _has_members(engine):
            raise ConfigurationError(f"the engine {name!r} makes {_described(engine)}")
        return engine
    if _has_members(model):
        return model
    raise ConfigurationError(f"a model is a name, a folder or an Engine, not {_described(model)}")


def _has_members(model: object) -> TypeGuard[Engine]:
    """Whether it has all that an engine has; since Python 3.12 ``isinstance`` does not see what a wrapper passes on."""
    if isinstance(model, type):
        return False
    names = {*Engine.__annotations__, *(name for name in vars(Engine) if not name.startswith("_"))}
    return all(hasattr(model, name) for name in names)


def _described(model: Any) -> str:
    """What somebody gave for a model, and what to give instead where that is known."""
    if isinstance(model, type):
        return f"the class {model.__name__}; give an object of it, such as {model.__name__}(...)"
    kind = type(model).__name__
    if callable(getattr(model, "generate", None)) and hasattr(model, "config"):
        return f"a {kind}, which lacks its tokenizer; save_pretrained both into one folder and give that"
    if callable(getattr(model, "ainvoke", None)):
        return f"a {kind}; for a LangChain chat model there is tta_langchain_agents.GuardedChatModel"
    return f"{kind!r}, which lacks members of tta_middleware.protocols.Engine"


def check_options(model: str | Engine, options: Iterable[str]) -> None:
    """Whether the engine of a model reference takes options of these names; the engine is not made.

    Raises:
        ConfigurationError: it has no such option, or is an object, which takes none any more.
    """
    if not isinstance(model, str):
        raise ConfigurationError(
            f"{' and '.join(sorted(options))} would change nothing: the model is an engine that is made already; give "
            f"such settings to {type(model).__name__}(...)"
        )
    name, _ = _engine(model)
    taken = signature(_load(ENGINES, "engine", name)).parameters
    unknown = sorted(set(options) - set(taken))
    if unknown and Parameter.VAR_KEYWORD not in {parameter.kind for parameter in taken.values()}:
        raise ConfigurationError(f"the engine {name!r} has no {' and no '.join(unknown)} to set; leave it out")


def _engine(model: str) -> tuple[str, str]:
    """An engine's name and what it is given."""
    name, colon, reference = model.partition(":")
    return (name, reference) if colon and name in names(ENGINES) else ("transformers", model)


def resolve_moderator(
    moderator: str | Moderator | Any, *, engine: Engine | None = None, calibration: CalibrationOf | None = None
) -> Moderator:
    """A moderator for a name such as ``local`` or ``openai``, or from any object with a ``moderate`` of texts.

    ``cascade`` asks ``local`` first (:class:`~tta_middleware.moderation.cascade.Cascade`).
    ``self`` is ``engine``, the model that answers, and ``guard:MODEL`` another model of this process: its reference is
    read as :func:`resolve_engine` does, and it is loaded with the first text. Such a model is asked, see
    :class:`~tta_middleware.moderation.llm_judge.LLMJudge`. ``self+local`` asks both, and the higher score counts.

    What an object lacks is filled in: see :class:`~tta_middleware.moderation.adapters.plain.PlainModerator`.

    Args:
        engine: what answers; None where that is no engine of this process.
        calibration: what was measured of a judging model.

    Raises:
        ConfigurationError: an unknown name, an engine that cannot be asked, or an object without ``moderate``.
    """
    if isinstance(moderator, str):
        asked = moderators_in(moderator)
        made = [_made(name, engine, calibration or _uncalibrated) for name in asked]
        if len(made) == 1:
            return made[0]
        from tta_middleware.moderation.ensemble import Ensemble

        return Ensemble(made)
    from tta_middleware.moderation.adapters.plain import as_moderator

    return as_moderator(moderator)


def _made(name: str, engine: Engine | None, calibration: CalibrationOf) -> Moderator:
    made = _load(MODERATORS, "moderator", name)
    if name not in _OWN and judging_model(name) is None:
        return _filled_in(name, _called("moderator", name, made))
    judge, known = _judge(name, engine, calibration)
    if not name.startswith(CASCADE):
        return judge
    return cast(
        Moderator, made(_load(MODERATORS, "moderator", LOCAL)(), judge, bounds=known and known.cascade, name=name)
    )


def _filled_in(name: str, made: Any) -> Moderator:
    """A part of an entry point as if its user had given it as an object.

    Raises:
        ConfigurationError: it has no ``moderate``.
    """
    try:
        return resolve_moderator(object() if isinstance(made, str) else made)
    except ConfigurationError as error:
        raise ConfigurationError(f"the moderator {name!r} makes none: {error}") from None


def _judge(name: str, engine: Engine | None, calibration: CalibrationOf) -> tuple[Moderator, JudgeCalibration | None]:
    """The model that a moderator of that name asks, and what was measured of it."""
    made = _load(MODERATORS, "moderator", OWN)
    if (reference := judging_model(name)) is not None:
        known = calibration(reference)
        return made(resolve_engine(reference), name=name, calibration=known or _unfitted(), closes=True), known
    if engine is None:
        raise _nothing_to_ask(name)
    known = calibration(engine.model_id)
    return made(engine, name=name, calibration=known or _unfitted()), known


def _unfitted() -> JudgeCalibration:
    from tta_middleware.moderation.llm_judge import UNFITTED

    return UNFITTED


def _uncalibrated(_model: str) -> None:
    """Nothing is known of any model."""


def check_policies(moderator: str | Moderator, policies: StagePolicies) -> None:
    """Whether a moderator, or the one of that name, scores what ``policies`` enforce; none is made for it.

    Raises:
        ConfigurationError: it declares what it scores, and something is missing.
    """
    ruled = any(policies.at(stage).rules for stage in STAGES)
    if not (enforced(policies) or ruled):
        return
    if isinstance(moderator, str):
        kinds = [_load(MODERATORS, "moderator", name) for name in moderators_in(moderator)]
        check_scored(policies, _scored_by(kinds), moderator)
        check_rules(policies, read=any(map(reads_rules, kinds)), moderator=moderator)
    else:
        found = resolve_moderator(moderator)
        check_scored(policies, categories_of(found), found.name)
        check_rules(policies, read=reads_rules(found), moderator=found.name)


def _scored_by(kinds: Iterable[object]) -> list[str] | None:
    declared = [categories_of(kind) for kind in kinds]
    known = [names for names in declared if names is not None]
    return [name for names in known for name in names] if len(known) == len(declared) else None


def resolve_method(method: str | Method | None) -> Method | None:
    """A search method for a name, or the method itself; ``none`` and None mean that flagged answers are blocked.

    Raises:
        ConfigurationError: an unknown name, or an object without the Method protocol.
    """
    if method is None or method == "none":
        return None
    if isinstance(method, str):
        made = _called("method", method, _load(METHODS, "method", method))
        if not isinstance(made, Method):
            raise ConfigurationError(f"the method {method!r} makes a {type(made).__name__}; {_OF_A_METHOD}")
        return made
    given: Any = method
    if isinstance(given, Method) and not isinstance(given, type):
        return given
    kind = f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__
    raise ConfigurationError(f"a method is a name or an object; {kind} is neither: {_OF_A_METHOD}")


_OF_A_METHOD = "it has name, needs and build (tta_middleware.methods.base.Method)"
