"""Any object with a ``moderate`` as a moderator: with or without a name, a threshold and sockets, async or not."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from inspect import Parameter, isawaitable, iscoroutinefunction, signature
from numbers import Real
from typing import Any

import anyio.to_thread

from tta_middleware.errors import ConfigurationError
from tta_middleware.moderation.closing import Closing
from tta_middleware.policy.verdicts import load
from tta_middleware.protocols import Moderator
from tta_middleware.types import Verdict

DEFAULT_THRESHOLD = 0.5


class PlainModerator(Closing):
    """Fills in what an object with a ``moderate`` of texts lacks.

    ``moderate`` may be a coroutine function or an ordinary one, which then runs in a thread; it is given ``prompt`` if
    it takes it. ``name`` is the class's by default, ``default_threshold`` 0.5.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.name: str = getattr(inner, "name", None) or type(inner).__name__
        self.default_threshold: float = getattr(inner, "default_threshold", DEFAULT_THRESHOLD)
        self.max_characters: int | None = getattr(inner, "max_characters", None)
        self.overlap: int | None = getattr(inner, "overlap", None)
        self.categories: tuple[str, ...] | None = getattr(inner, "categories", None)
        self._takes_prompt = _takes(inner.moderate, "prompt")

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        ask = partial(self.inner.moderate, texts, **({"prompt": prompt} if self._takes_prompt else {}))
        verdicts = (
            ask() if is_async(self.inner.moderate) else await anyio.to_thread.run_sync(ask, abandon_on_cancel=True)
        )
        return await verdicts if isawaitable(verdicts) else verdicts  # type: ignore[no-any-return]

    async def load(self) -> None:
        """Load the object, if it says how."""
        await load(self.inner)

    async def aclose(self) -> None:
        """Release what the object holds, if it says how."""
        close = getattr(self.inner, "aclose", None)
        if close is not None and isawaitable(done := close()):
            await done


def as_moderator(given: Any) -> Moderator:
    """The object itself, if it is asked as the protocol says; else one that fills in what it lacks.

    Raises:
        ConfigurationError: it has no ``moderate``, or no score for a threshold; says what to write for what users try.
    """
    if isinstance(given, str):
        raise ConfigurationError(
            f"a moderator that stands within another one is an object, not a name such as {given!r:.40}; write "
            "EmbeddedModerator() for 'local' (tta_middleware.moderation.embedded), production_moderator() for 'openai' "
            "(tta_middleware.moderation.stack)"
        )
    if isinstance(given, type) or not callable(getattr(given, "moderate", None)):
        raise ConfigurationError(
            f"a moderator is a name, or an object with moderate(texts) that gives a Verdict for each text; "
            f"{getattr(given, '__name__', type(given).__name__)} is neither{_instead(given)}"
        )
    made = given if isinstance(given, Moderator) and _moderates_as_told(given) else PlainModerator(given)
    limit: Any = made.default_threshold
    if not (isinstance(limit, Real) and 0.0 <= float(limit) <= 1.0):
        raise ConfigurationError(f"default_threshold of {type(given).__name__} is a score in [0, 1], not {limit!r:.40}")
    return made


def _moderates_as_told(moderator: Moderator) -> bool:
    """Whether it is asked as the protocol says it: awaited, with the prompt along."""
    ask = moderator.moderate
    try:
        parameters = signature(ask).parameters.values()
    except ValueError:  # one of C, which has none to tell
        return iscoroutinefunction(ask)
    takes_prompt = any(one.name == "prompt" or one.kind is Parameter.VAR_KEYWORD for one in parameters)
    return iscoroutinefunction(ask) and takes_prompt


def _instead(given: Any) -> str:
    """What to write for what users try."""
    if isinstance(given, type) and hasattr(given, "moderate"):
        return f"; write {given.__name__}(...) for an object of that class"
    if hasattr(given, "moderations"):
        return "; write OpenAIModerator(base_url=..., api_key=...) for a client of OpenAI's"
    if not isinstance(given, type) and (callable(given) or hasattr(given, "ainvoke")):
        return "; write RunnableModerator(...) around a function of a text or a runnable"
    return ""


def is_async(function: Any) -> bool:
    """Whether a function, a method, a partial or an object with ``__call__`` is a coroutine function."""
    while isinstance(function, partial):
        function = function.func
    return iscoroutinefunction(function) or iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def _takes(function: Any, name: str) -> bool:
    try:
        parameters = signature(function).parameters
    except (TypeError, ValueError):
        return True
    return name in parameters or Parameter.VAR_KEYWORD in {parameter.kind for parameter in parameters.values()}
