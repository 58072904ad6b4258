"""The production stack: the OpenAI moderator with everything around it, in the right order.

From the outside in:

    WithFallback     a second moderator answers when all below has failed
    Cached           known texts cost nothing; equal texts on their way are asked for once
    Coalescing       concurrent calls become one request
    Retrying         one retry policy for the whole stack
    WithBreaker      each attempt counts; while the server is down, none is sent and no wait is begun
    Limited          each attempt that is sent takes its turn in the rate limits' queue
    Hedged           off by default; a second request only where the limits have room at once, in flight and a minute
    OpenAIModerator  one attempt

The fallback stands outside the cache, so its verdicts are never kept under the first moderator's name.
"""

from __future__ import annotations

from pydantic import Field, PositiveFloat, PositiveInt

from tta_middleware.aio import process as _process
from tta_middleware.config import Settings
from tta_middleware.moderation.breaker import BreakerSettings, CircuitBreaker, WithBreaker
from tta_middleware.moderation.cache import Cached, CacheSettings, VerdictCache
from tta_middleware.moderation.coalesce import Coalescing, CoalescingSettings
from tta_middleware.moderation.fallback import WithFallback
from tta_middleware.moderation.hedge import Hedged, HedgeSettings
from tta_middleware.moderation.limits import Limited, Limiter, RateLimits, estimate_tokens
from tta_middleware.moderation.openai import OpenAIModerator
from tta_middleware.moderation.request_size import BatchLimits
from tta_middleware.moderation.retry import Retrier, Retrying, RetryPolicy
from tta_middleware.moderation.wrapper import Wrapper
from tta_middleware.protocols import Moderator

_lock = _process.Lock()
_breakers: dict[tuple[str | None, BreakerSettings], CircuitBreaker] = {}


class StackSettings(Settings):
    """Settings of :func:`production_moderator`.

    Attributes:
        model: the moderation model's name.
        base_url: None takes OPENAI_BASE_URL or the public API.
        timeout: seconds for one attempt.
        max_characters: longer texts go as parts that overlap, in the same request; None sends them as they are.
        retry: attempts, elapsed time and waits of a call.
        breaker: when the server is left alone; None goes without a breaker.
        limits: requests and tokens per minute of this process.
        coalescing: how concurrent calls are gathered; None sends each call on its own.
        cache: bounds of the cache; None goes without one.
        hedge: when a slow request is sent a second time; None, the default, never.
    """

    model: str = "omni-moderation-latest"
    base_url: str | None = None
    timeout: PositiveFloat = 10.0
    max_characters: PositiveInt | None = 4_000
    retry: RetryPolicy = Field(default_factory=RetryPolicy)
    breaker: BreakerSettings | None = Field(default_factory=BreakerSettings)
    limits: RateLimits = Field(default_factory=RateLimits)
    coalescing: CoalescingSettings | None = Field(default_factory=CoalescingSettings)
    cache: CacheSettings | None = Field(default_factory=CacheSettings)
    hedge: HedgeSettings | None = None


def production_moderator(
    settings: StackSettings | None = None,
    *,
    api_key: str | None = None,
    fallback: Moderator | None = None,
    allow_fewer_categories: bool = False,
) -> Wrapper:
    """The OpenAI moderator in its production stack; nothing is opened before the first text.

    Args:
        api_key: None takes OPENAI_API_KEY at the first request.
        fallback: answers when the API does not, for example the embedded moderator.
        allow_fewer_categories: accept a fallback that scores less than the API.

    Raises:
        ConfigurationError: a setting is unusable, or the fallback scores less.
    """
    chosen = settings or StackSettings()
    stack = _around(Retrying(_attempt(chosen, api_key), Retrier(chosen.retry)), chosen)
    if fallback is None:
        return stack
    return WithFallback(stack, fallback, allow_fewer_categories=allow_fewer_categories)


def shared_breaker(base_url: str | None, settings: BreakerSettings) -> CircuitBreaker:
    """The process's breaker for a server; equal arguments give the same one."""
    with _lock:
        return _breakers.setdefault((base_url, settings), CircuitBreaker(settings))


def _attempt(settings: StackSettings, api_key: str | None) -> Wrapper:
    """One attempt: hedge, rate limits and breaker around a client that does not retry."""
    limiter = Limiter(settings.limits)
    batch = settings.coalescing or BatchLimits()
    moderator: Moderator = OpenAIModerator(
        settings.model,
        base_url=settings.base_url,
        api_key=api_key,
        timeout=settings.timeout,
        retry=RetryPolicy(attempts=1, max_elapsed=settings.retry.max_elapsed),
        max_characters=settings.max_characters,
        limits=BatchLimits(max_texts=batch.max_texts, max_characters=batch.max_characters),
    )
    if settings.hedge:
        moderator = Hedged(
            moderator,
            settings.hedge,
            admit=lambda texts: limiter.try_admit(sum(map(estimate_tokens, texts))),
        )
    limited = Limited(moderator, limiter)
    if settings.breaker is None:
        return limited
    return WithBreaker(limited, shared_breaker(settings.base_url, settings.breaker))


def _around(stack: Wrapper, settings: StackSettings) -> Wrapper:
    """What stands outside the retries; the API does not read prompts, so calls for any may be shared."""
    if settings.coalescing:
        stack = Coalescing(stack, settings.coalescing, reads_prompt=False)
    if settings.cache:
        stack = Cached(stack, VerdictCache(settings.cache), reads_prompt=False)
    return stack
