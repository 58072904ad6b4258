"""What a guard is told about repairs, and what it tells of one answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from inspect import isawaitable
from typing import Literal, TypeAlias, get_args

from tta_middleware.config import Budget, Reasoning, Windows, check_takes_one
from tta_middleware.errors import ConfigurationError
from tta_middleware.methods.base import Method
from tta_middleware.types import Candidate, GuardedAnswer, Message

FallbackFunction: TypeAlias = Callable[[Sequence[Message]], Awaitable[str]]
Fallback: TypeAlias = Literal["refuse", "raise"] | FallbackFunction
BRIDGES = (
    "...\n\nOn second thoughts, I can't go on with this. What I can do instead is",
    "...\n\nLet me stop here, because this could hurt someone. A safe way to go about it is",
)

Preference: TypeAlias = Literal["helpful", "first"]
"""Which of a wave's good answers is given out: the one that says most about the question, or the first asked for."""

PromptCheck: TypeAlias = Literal["off", "user", "all"]


@dataclass(frozen=True, slots=True)
class Repair:
    """How a flagged answer is repaired.

    Attributes:
        method: a search method; None blocks and falls back at once.
        budget: what one answer may cost, the first one included; the fallback's own text and its check come after it.
        fallback: what follows when no safe and usable answer was found: the policy's notice, an
            :class:`~tta_middleware.errors.UnsafeAnswerError`, or an async function of the messages whose text
            is moderated like any other.
        seed: the search's random generator; equal seeds give equal searches.
        bridges: texts that may lead from what has left to something safe when a late flag is not mended by moved
            embeddings alone; the model goes on from them. An empty tuple never puts words into the answer.
        reasoning_tokens: how many tokens a candidate of a model that thinks may think: 0 has it answer at once, behind
            thoughts that have left; None lets it think as the first answer was.
        commit: length in characters of a candidate's first window. A candidate is chosen when that is safe and
            usable, and the others of its wave are dropped; None chooses between whole answers.
        prefer: which is chosen where several of a wave are safe and usable at their commit points: ``helpful``, the one
            that takes up most of the question's words, refusals last, or ``first``, in the order of asking. The former
            waits until all of a wave are there.
    """

    method: Method | None = None
    budget: Budget = field(default_factory=Budget)
    fallback: Fallback = "refuse"
    seed: int = 0
    bridges: tuple[str, ...] = BRIDGES
    commit: int | None = 120
    reasoning_tokens: int | None = 0
    prefer: Preference = "first"

    def __post_init__(self) -> None:
        """Raises ConfigurationError for values of other kinds, which show at the first flagged answer otherwise."""
        check_kind("method", self.method, Method, 'an object, such as Race(), or None; TTAChatModel(method="race")')
        check_kind("budget", self.budget, Budget, "Budget(generations=12)")
        if not callable(self.fallback):
            check_choice("fallback", self.fallback, ("refuse", "raise"), ", or an async function of the messages")
        else:
            check_takes_one("a fallback", self.fallback, "an async function of the messages")
        check_choice("prefer", self.prefer, get_args(Preference))


async def said_by(fallback: FallbackFunction, messages: Sequence[Message]) -> str:
    """What a fallback says.

    Raises:
        ConfigurationError: it is no async function, or gives no text.
    """
    said: object = fallback(messages)
    if not isawaitable(said):
        raise ConfigurationError("a guard's fallback is an async function; TTAChatModel takes an ordinary one, too")
    text: object = await said
    if not isinstance(text, str):
        raise ConfigurationError(f"a guard's fallback gives a text, not {type(text).__name__}")
    return text


def check_scorer(moderator: object) -> None:
    """Whether this can be a moderator.

    Raises:
        ConfigurationError: it is a name, or lacks what a moderator needs.
    """
    if isinstance(moderator, str):
        raise ConfigurationError(f"a moderator is an object here, such as EmbeddedModerator(), not {moderator!r:.40}")
    lacking = [name for name in ("moderate", "name", "default_threshold") if not hasattr(moderator, name)]
    if lacking:
        raise ConfigurationError(
            f"{type(moderator).__name__} is no Moderator (tta_middleware.protocols): it has no {lacking[0]}; "
            "tta_middleware.moderation.adapters.plain.PlainModerator makes one of anything with a moderate of texts"
        )


def check_kind(name: str, value: object, kind: type, instead: str) -> None:
    """Raises ConfigurationError for a setting that is neither None nor of ``kind``; ``instead`` is what to write."""
    if value is not None and (isinstance(value, type) or not isinstance(value, kind)):
        raise ConfigurationError(f"{name} is {instead}, not {value!r:.40}")


def check_choice(name: str, value: object, known: Collection[str], more: str = "") -> None:
    """Raises ConfigurationError for a setting that is none of the words ``known``."""
    if value not in known:
        raise ConfigurationError(f"{name} is one of {', '.join(known)}{more}, not {value!r:.40}")


def check_settings(repair: object, windows: object, reasoning: object, prompt_check: object) -> None:
    """Raises ConfigurationError for settings of a guard that are of other kinds, or words that mean nothing."""
    check_kind("repair", repair, Repair, "Repair(method=..., budget=...)")
    check_kind("windows", windows, Windows, "Windows(first=..., largest=...)")
    check_kind("reasoning", reasoning, Reasoning, "Reasoning(mode=...)")
    check_choice("prompt_check", prompt_check, get_args(PromptCheck))


@dataclass(frozen=True, slots=True, eq=False)
class Report:
    """An answer with everything that was found on the way, for evaluations.

    Unlike :class:`~tta_middleware.types.GuardedAnswer` it holds candidates, flagged ones among them: never show
    their text.
    """

    answer: GuardedAnswer
    baseline: Candidate | None
    final: Candidate | None
