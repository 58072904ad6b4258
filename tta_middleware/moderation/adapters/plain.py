"""Any object with a ``moderate`` as a moderator: with or without a name, a threshold and sockets, async or not."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from inspect import Parameter, isawaitable, iscoroutinefunction, signature
from typing import Any

import anyio.to_thread

from tta_middleware.moderation.wrapper import Closing
from tta_middleware.policy.verdicts import load
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
