"""Any LangChain runnable or async function as a moderator; nothing here imports LangChain."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, TypeAlias, runtime_checkable

from tta_middleware.errors import ConfigurationError, InvalidVerdictError, ModerationUnavailableError
from tta_middleware.moderation.concurrency import gather
from tta_middleware.moderation.request_size import checked_limit
from tta_middleware.moderation.wrapper import Closing
from tta_middleware.policy.verdicts import in_parts
from tta_middleware.types import Verdict

ScoringFunction: TypeAlias = Callable[[str, str | None], Awaitable[Any]]


@runtime_checkable
class RunnableLike(Protocol):
    """What is needed of a LangChain runnable."""

    async def ainvoke(self, input: Any, config: Any = None) -> Any: ...  # noqa: A002


class RunnableModerator(Closing):
    """Asks a runnable or an async function for each text.

    A runnable is given ``{"text": ..., "prompt": ...}``, without the callbacks of the surrounding run: they would
    carry the text under moderation to every listener. A function is called with text and prompt. A chat model in either
    keeps that text in LangChain's global cache, where there is one, unless it is made with ``cache=False``.

    Args:
        scorer: the runnable or function.
        parse: turns its output into a :class:`Verdict`, a mapping of scores, or one score; without it the output
            must be one of these. A ``ValueError``, ``KeyError`` or ``TypeError`` from it means an unusable answer.
        unavailable: exceptions of the scorer that mean it could not be reached; all others pass through.
        concurrency: texts scored at once.
        categories: what it scores; without it, the first verdict shows whether a policy's categories are among them.
        max_characters: longer texts go as parts that overlap; None, the default, hands over texts of any length.
    """

    def __init__(
        self,
        scorer: RunnableLike | ScoringFunction,
        *,
        name: str = "runnable",
        default_threshold: float = 0.5,
        parse: Callable[[Any], Any] | None = None,
        unavailable: tuple[type[Exception], ...] = (TimeoutError, OSError),
        concurrency: int = 8,
        categories: Sequence[str] | None = None,
        max_characters: int | None = None,
    ) -> None:
        if not (isinstance(scorer, RunnableLike) or callable(scorer)):
            raise ConfigurationError("a scorer is an async function or has an async method ainvoke")
        self.name = name
        self.default_threshold = default_threshold
        self._scorer = scorer
        self._parse = parse or (lambda output: output)
        self._unavailable = unavailable
        self._concurrency = concurrency
        self.categories = None if categories is None else tuple(categories)
        self.max_characters = checked_limit(max_characters)

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        """One verdict per text.

        Raises:
            ModerationUnavailableError: the scorer raised one of ``unavailable``.
            InvalidVerdictError: its output holds no usable scores.
        """
        if not texts:
            return []
        return await in_parts(texts, partial(self._each, prompt=prompt), self.max_characters)

    async def _each(self, texts: Sequence[str], *, prompt: str | None) -> list[Verdict]:
        return await gather([partial(self._score, text, prompt) for text in texts], limit=self._concurrency)

    async def _score(self, text: str, prompt: str | None) -> Verdict:
        try:
            output = await self._call(text, prompt)
        except self._unavailable as error:
            failure = f"the scorer of moderator {self.name!r} raised {type(error).__name__}"
        else:
            return self._verdict(output)
        raise ModerationUnavailableError(failure, cause="connection")

    async def _call(self, text: str, prompt: str | None) -> Any:
        if isinstance(self._scorer, RunnableLike):
            return await self._scorer.ainvoke({"text": text, "prompt": prompt}, {"callbacks": []})
        return await self._scorer(text, prompt)

    def _verdict(self, output: Any) -> Verdict:
        try:
            parsed = self._parse(output)
            if isinstance(parsed, Verdict):
                return parsed
            scores = parsed if isinstance(parsed, Mapping) else {"unsafe": parsed}
            scores = {str(name): _number(score) for name, score in scores.items()}
        except (ValueError, KeyError, TypeError):
            scores = {}
        if not scores:
            raise InvalidVerdictError(f"the scorer of moderator {self.name!r} gave no usable scores")
        flagged = max(scores.values()) >= self.default_threshold
        return Verdict(scores=scores, flagged=flagged, model=self.name)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError("a score is a number")
    return float(value)
