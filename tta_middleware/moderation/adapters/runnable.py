"""Any LangChain runnable or function as a moderator; nothing here imports LangChain."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import Parameter, isawaitable, signature
from numbers import Real
from typing import Any, Protocol, TypeAlias, runtime_checkable

import anyio.to_thread

from tta_middleware.config import check_takes_one
from tta_middleware.errors import ConfigurationError, InvalidVerdictError, ModerationUnavailableError
from tta_middleware.moderation.adapters.plain import is_async
from tta_middleware.moderation.closing import Closing
from tta_middleware.moderation.concurrency import gather
from tta_middleware.moderation.request_size import checked_limit
from tta_middleware.policy.verdicts import in_parts
from tta_middleware.types import Verdict

ScoringFunction: TypeAlias = Callable[..., Any]


@runtime_checkable
class RunnableLike(Protocol):
    """What is needed of a LangChain runnable."""

    async def ainvoke(self, input: Any, config: Any = None) -> Any: ...  # noqa: A002


class RunnableModerator(Closing):
    """Asks a runnable or a function for each text.

    A runnable is given ``{"text": ..., "prompt": ...}``, without the callbacks of the surrounding run: they would
    carry the text under moderation to every listener. A function is called with the text, and with the prompt if it
    takes a second argument; one that is not async runs in a thread. A chat model in either keeps that text in
    LangChain's global cache, where there is one, unless it is made with ``cache=False``.

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
            raise ConfigurationError("a scorer is a function of a text, async or not, or has an async method ainvoke")
        self.name = name
        self.default_threshold = default_threshold
        self._scorer = scorer
        self._takes_prompt = not isinstance(scorer, RunnableLike) and _takes_two(scorer)
        if not (self._takes_prompt or isinstance(scorer, RunnableLike)):
            check_takes_one("a scorer", scorer, "lambda text: 0.1")
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
        ask = partial(self._scorer, *((text, prompt) if self._takes_prompt else (text,)))
        output = ask() if is_async(self._scorer) else await anyio.to_thread.run_sync(ask, abandon_on_cancel=True)
        return await output if isawaitable(output) else output

    def _verdict(self, output: Any) -> Verdict:
        try:
            parsed = self._parse(output)
            if isinstance(parsed, Verdict):
                return parsed
            scores = parsed if isinstance(parsed, Mapping) else {"unsafe": parsed}
            scores = {str(name): _number(score) for name, score in scores.items()}
        except (ValueError, KeyError, TypeError, OverflowError):
            scores = {}
        if not scores:
            raise InvalidVerdictError(f"the scorer of moderator {self.name!r} gave no usable scores")
        flagged = max(scores.values()) >= self.default_threshold
        return Verdict(scores=scores, flagged=flagged, model=self.name)


def _takes_two(function: Callable[..., Any]) -> bool:
    """Whether it has a second argument for the prompt: one by that name, or one that has to be given."""
    try:
        parameters = list(signature(function).parameters.values())
    except (TypeError, ValueError):  # a builtin, which does not tell
        return True
    if any(each.kind is Parameter.VAR_POSITIONAL for each in parameters):
        return True
    second = [each for each in parameters if each.kind in _BY_PLACE][1:2]
    return any(each.name == "prompt" or each.default is Parameter.empty for each in second)


_BY_PLACE = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


def _number(value: Any) -> float:
    """Numbers of numpy are such, too; true and false are not."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError("a score is a number")
    return float(value)
