"""The OpenAI moderation API and servers that speak it.

Source: https://platform.openai.com/docs/api-reference/moderations
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from tta_middleware.errors import InvalidVerdictError
from tta_middleware.moderation.closing import Closing
from tta_middleware.moderation.concurrency import gather
from tta_middleware.moderation.request_size import BatchLimits, checked_limit, split, without_blanks
from tta_middleware.moderation.retry import Retrier, RetryPolicy
from tta_middleware.moderation.transport import QuietText, Transport
from tta_middleware.policy.verdicts import in_parts
from tta_middleware.types import CATEGORIES, Verdict


class OpenAIModerator(Closing):
    """Scores texts with ``/moderations``: a list of texts is one request, up to ``limits``.

    Neither construction nor import touches the network, the key or the openai package; the first request does.
    One moderator may be used from several event loops at once; each gets its own connections, which end with the
    loop or with :meth:`aclose`. A deadline of the caller, set with an anyio cancel scope, bounds all retries.

    Texts of white space alone are not sent, since the API refuses them: there is nothing in them to flag, and
    they score 0 in every category.

    Args:
        base_url: a compatible server's, such as ``http://127.0.0.1:8000/v1``; None takes OPENAI_BASE_URL or the
            public API.
        api_key: None takes OPENAI_API_KEY at the first request.
        timeout: seconds for one attempt, from the request to the last byte.
        retry: None takes the defaults of :class:`RetryPolicy`.
        limits: bounds of one request; longer lists are sent as several, side by side.
        categories: the categories that each answer must score.
        max_characters: longer texts go as parts that overlap, in the same request; None sends them as they are. The
            default keeps to the 4,096 tokens that the API scores at once in nearly any script: it cuts longer texts
            into such stretches itself, without overlap, and drops what lies beyond 32,768 tokens.

    Raises:
        ConfigurationError: ``base_url`` or ``timeout`` is unusable.
    """

    default_threshold = 0.1
    categories: tuple[str, ...] = CATEGORIES

    def __init__(
        self,
        model: str = "omni-moderation-latest",
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        timeout: float = 10.0,
        retry: RetryPolicy | None = None,
        limits: BatchLimits | None = None,
        categories: Sequence[str] = CATEGORIES,
        max_characters: int | None = 4_000,
    ) -> None:
        self.model = model
        self.name = f"openai/{model}"
        self._transport = Transport(base_url=base_url, api_key=api_key, timeout=timeout)
        self._limits = limits or BatchLimits()
        self.categories = tuple(categories)
        self.max_characters = checked_limit(max_characters)
        self._retrier = Retrier(retry)

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        """One verdict per text, in order; ``prompt`` is not sent: the API reads single texts.

        Raises:
            ConfigurationError: there is no key.
            ModerationUnavailableError: timeouts, connection errors, 408, 409, 429 or 5xx until the retry policy
                or the caller's deadline ended.
            ModerationRejectedError: the key, a permission or the request is at fault.
            InvalidVerdictError: the answer has not the shape of a moderation.
        """
        score = partial(without_blanks, categories=self.categories, model=self.model, score=self._score)
        return await in_parts(texts, score, self.max_characters)

    async def load(self) -> None:
        """Find the key; nothing is sent.

        Raises:
            ConfigurationError: there is none.
        """
        await self._transport.load()

    async def aclose(self) -> None:
        await self._transport.aclose()

    async def _score(self, texts: Sequence[str]) -> list[Verdict]:
        groups = split(texts, self._limits)
        calls = [partial(self._retrier.call, partial(self._request, group)) for group in groups]
        return [verdict for answer in await gather(calls) for verdict in answer]

    async def _request(self, texts: Sequence[str]) -> list[Verdict]:
        body = {"model": self.model, "input": [QuietText.of(text) for text in texts]}
        payload = await self._transport.post("/moderations", body)
        return parse_moderations(
            payload,
            len(texts),
            categories=self.categories,
            model=self.model,
            where=self._transport.where,
        )


def parse_moderations(
    payload: Any,
    count: int,
    *,
    categories: Sequence[str],
    model: str,
    where: str,
    rename: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
) -> list[Verdict]:
    """Verdicts from an answer of the form ``{"results": [{"flagged", "category_scores"}]}``.

    Args:
        count: how many results there must be.
        categories: the categories that each result must score; further ones are kept.
        model: the verdicts' model where the answer names none.
        where: the server, for error messages.
        rename: turns the server's scores into those of the verdict.

    Raises:
        InvalidVerdictError: a result or score is missing or unusable.
    """
    results = payload.get("results") if isinstance(payload, dict) else None
    if not isinstance(results, list) or len(results) != count:
        got = f"{len(results)} results" if isinstance(results, list) else "no list of results"
        raise InvalidVerdictError(f"{where} gave {got} for {count} texts")
    named = payload.get("model")
    model = named if isinstance(named, str) and named else model
    return [_verdict(result, categories, model, where, rename) for result in results]


def _verdict(
    result: Any,
    categories: Sequence[str],
    model: str,
    where: str,
    rename: Callable[[Mapping[str, Any]], Mapping[str, Any]],
) -> Verdict:
    scores = result.get("category_scores") if isinstance(result, dict) else None
    if not isinstance(scores, dict):
        raise InvalidVerdictError(f"{where} gave a result without category_scores")
    scores = rename(scores)
    missing = [name for name in categories if name not in scores]
    if missing:
        raise InvalidVerdictError(f"{where} gave no score for {', '.join(missing)}")
    for name, score in scores.items():
        if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
            raise InvalidVerdictError(f"{where} gave a score for {name!r} that is no number from 0 to 1")
    scores = {name: float(score) for name, score in scores.items()}
    return Verdict(scores=scores, flagged=_flag(result, where), model=model)


def _flag(result: Mapping[str, Any], where: str) -> bool:
    """The result's own flag, or, where the API has none, whether any of its categories is set."""
    flags = result.get("categories")
    flag = result.get("flagged", any(flags.values()) if isinstance(flags, dict) and flags else None)
    if not isinstance(flag, bool):
        raise InvalidVerdictError(f"{where} gave a result whose flag is neither true nor false")
    return flag
