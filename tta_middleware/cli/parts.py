"""Builds engine, moderator, policy and guard from what was typed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio

from tta_middleware.cli.options import Loading
from tta_middleware.cli.output import note
from tta_middleware.config import Budget
from tta_middleware.errors import ConfigurationError
from tta_middleware.guard.guard import Guard, Repair
from tta_middleware.policy import Policy
from tta_middleware.profiles.store import quality_for
from tta_middleware.protocols import Engine, Moderator
from tta_middleware.registry import resolve_method, resolve_moderator
from tta_middleware.types import GuardedAnswer, Message, Sampling

_NOTICEABLE_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answering(Loading):
    """How answers are made."""

    moderator: str
    method: str
    policy: Policy
    sampling: Sampling
    budget: Budget

    @asynccontextmanager
    async def guard(self) -> AsyncIterator[Guard]:
        """A guard whose parts are closed afterwards, in the loop that used them."""
        async with opened(self, self.moderator) as (engine, moderator):
            yield self.guard_over(engine, moderator)

    def guard_over(self, engine: Engine, moderator: Moderator) -> Guard:
        """A guard over parts that somebody else closes."""
        repair = Repair(method=resolve_method(self.method), budget=self.budget, seed=self.sampling.seed)
        return Guard(engine, moderator, policy=self.policy, repair=repair, quality=quality_for(self.model))

    async def answer(self, messages: Sequence[Message]) -> GuardedAnswer:
        """One answer, with parts of its own."""
        async with self.guard() as guard:
            return await guard.answer(messages, self.sampling)


@asynccontextmanager
async def opened(loading: Loading, moderator: str) -> AsyncIterator[tuple[Engine, Moderator]]:
    """Engine and moderator by name; the model is loaded, so that its mistakes show before any work.

    What that takes is told by itself where it is noticeable, since it counts in no answer's time.
    """
    scorer = resolve_moderator(moderator)
    engine = loading.engine()
    try:
        begun = time.monotonic()
        await engine.load()
        if (seconds := time.monotonic() - begun) >= _NOTICEABLE_SECONDS:
            note(f"{loading.model} loaded in {seconds:.1f} s")
        yield engine, scorer
    finally:
        with anyio.CancelScope(shield=True):
            await scorer.aclose()
            await engine.aclose()


def policy_of(text: str | None, threshold: float | None) -> Policy:
    """A policy from ``--policy`` and ``--threshold``, which wins.

    Raises:
        ConfigurationError: no JSON object, an unknown field or category, or a threshold outside [0, 1].
    """
    fields = _policy_fields(text) if text else {}
    return Policy(**fields | ({} if threshold is None else {"threshold": threshold}))


def _policy_fields(text: str) -> dict[str, Any]:
    inline = text.lstrip().startswith("{")
    where = "--policy" if inline else text
    try:
        fields = json.loads(text if inline else Path(text).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"--policy: cannot read {text}: {error.strerror}") from None
    except ValueError:
        raise ConfigurationError(f"{where} is not valid JSON") from None
    if not isinstance(fields, dict):
        raise ConfigurationError(f"{where} must hold a JSON object with threshold, categories, on_error or notice")
    return fields


def text_or_stdin(text: str | None) -> str:
    """The argument, or all of stdin without one or with ``-``.

    Raises:
        ConfigurationError: nothing was given, it is empty, or it is not UTF-8.
    """
    if text is None and sys.stdin.isatty():
        raise ConfigurationError("no text; give it as an argument or pipe it in")
    try:
        text = sys.stdin.buffer.read().decode() if text in (None, "-") else text.encode().decode()
    except UnicodeError:
        raise ConfigurationError("the text is not UTF-8") from None
    if not text.strip():
        raise ConfigurationError("the text is empty; give it as an argument or pipe it in")
    return text
