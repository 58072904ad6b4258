"""Guard models on any OpenAI-compatible chat server, with a graded score from the verdict token."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from tta_middleware.errors import InvalidVerdictError
from tta_middleware.moderation.adapters.guard_formats import GuardFormat
from tta_middleware.moderation.adapters.http import HTTPModerator
from tta_middleware.moderation.request_size import checked_limit
from tta_middleware.moderation.retry import RetryPolicy
from tta_middleware.moderation.transport import Transport
from tta_middleware.policy.verdicts import in_parts
from tta_middleware.types import Verdict

_TOP_LOGPROBS = 20
_TOO_LARGE = 700.0
"""A log-probability is at most 0; of one from here on the exponential is no float."""


class ChatGuardModerator(HTTPModerator):
    """Llama Guard, Granite Guardian, ShieldGemma, Qwen3Guard and their like.

    The category ``unsafe`` holds the probability of the unsafe verdicts among all verdicts at the verdict's
    token; categories that the model names get the same score. Labels alone would leave a search without a slope.

    Args:
        model: the name the server knows the model by.
        format: one of :mod:`tta_middleware.moderation.adapters.guard_formats`, or your own.
        base_url: the server's, with ``/v1``.
        api_key: None takes OPENAI_API_KEY; servers without keys take any text.
        timeout: seconds for one attempt.
        concurrency: texts scored at once; each is one request.
        max_characters: longer texts go as parts that overlap, one request each, and of a longer prompt its end is sent;
            None sends them as they are. The default, twice, fits a context of 8,192 tokens in most scripts.
    """

    default_threshold = 0.5

    def __init__(
        self,
        model: str,
        format: GuardFormat,  # noqa: A002
        *,
        base_url: str,
        api_key: str | None = None,
        timeout: float = 30.0,
        retry: RetryPolicy | None = None,
        concurrency: int = 8,
        max_characters: int | None = 4_000,
    ) -> None:
        super().__init__(Transport(base_url=base_url, api_key=api_key, timeout=timeout), retry, concurrency)
        self.model = model
        self.name = f"{format.name}/{model}"
        self._format = format
        self.categories = tuple(dict.fromkeys(["unsafe", *format.categories.values()]))
        self.max_characters = checked_limit(max_characters)

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        """One verdict per text as the answer to ``prompt``.

        Raises:
            ModerationError: as :class:`~tta_middleware.moderation.openai.OpenAIModerator`;
                :class:`InvalidVerdictError` also where the server sends no log-probabilities.
        """
        question = prompt[-self.max_characters :] if prompt and self.max_characters else prompt
        each = partial(self._each, score=partial(self._score, prompt=question))
        return await in_parts(texts, each, self.max_characters)

    async def _score(self, text: str, *, prompt: str | None) -> Verdict:
        body = {
            "model": self.model,
            "messages": self._format.messages(text, prompt),
            "max_tokens": self._format.max_tokens,
            "temperature": 0.0,
            "logprobs": True,
            "top_logprobs": _TOP_LOGPROBS,
            **self._format.extra_body,
        }
        answer, tokens = _choice(await self._post("/chat/completions", body), self._transport.where)
        unsafe = unsafe_probability(tokens, self._format)
        scores = {"unsafe": unsafe} | dict.fromkeys(named_categories(answer, self._format), unsafe)
        return Verdict(scores=scores, flagged=unsafe >= self.default_threshold, model=self.model)


def unsafe_probability(tokens: Sequence[Mapping[str, Any]], guard: GuardFormat) -> float:
    """How unsafe, in [0, 1]: the mean of the verdicts' values under their probabilities at the verdict's token.

    A token counts for the verdict it begins, since tokenisers split words differently.

    Raises:
        InvalidVerdictError: the answer has no verdict where the format expects one.
    """
    place = _verdict_token(tokens, guard)
    masses = dict.fromkeys(guard.verdicts, 0.0)
    alternatives = {item["token"]: item["logprob"] for item in (*place["top_logprobs"], place)}
    for token, logprob in alternatives.items():
        verdict = _begins(token, guard)
        if verdict is not None:
            masses[verdict] += math.exp(logprob) if logprob < _TOO_LARGE else math.inf
    total = sum(masses.values())
    if not (math.isfinite(total) and total > 0.0):
        raise InvalidVerdictError(f"the {guard.name} model's log-probabilities are unusable")
    return min(1.0, sum(guard.verdicts[name] * mass for name, mass in masses.items()) / total)


def named_categories(answer: str, guard: GuardFormat) -> list[str]:
    """The categories that ``answer`` names after its verdict, under our names."""
    return [
        ours for theirs, ours in guard.categories.items() if re.search(rf"(?<!\w){re.escape(theirs)}(?!\w)", answer)
    ]


def _verdict_token(tokens: Sequence[Mapping[str, Any]], guard: GuardFormat) -> Mapping[str, Any]:
    before = ""
    for item in tokens:
        at_marker = before.strip().endswith(guard.marker) if guard.marker else not before.strip()
        if at_marker and item["token"].strip() and _begins(item["token"], guard) is not None:
            return item
        before += item["token"]
    words = ", ".join(guard.verdicts)
    raise InvalidVerdictError(f"the {guard.name} model gave none of the verdicts {words}; check the chat template")


def _begins(token: str, guard: GuardFormat) -> str | None:
    word = token.strip().lower()
    return next((verdict for verdict in guard.verdicts if word and verdict.startswith(word)), None)


def _choice(payload: Any, where: str) -> tuple[str, Sequence[Mapping[str, Any]]]:
    """The first choice's text and tokens, checked."""
    try:
        choice = payload["choices"][0]
        answer, tokens = choice["message"]["content"] or "", (choice.get("logprobs") or {}).get("content")
        usable = tokens is None or all(_is_token(item) for item in tokens)
    except (KeyError, IndexError, TypeError, AttributeError):
        usable = False
    if not usable:
        raise InvalidVerdictError(f"{where} gave an answer that is no chat completion")
    if not tokens:
        raise InvalidVerdictError(f"{where} gave no log-probabilities; the guard's score needs top_logprobs")
    return answer, tokens


def _is_token(item: Mapping[str, Any]) -> bool:
    alternatives = [*item["top_logprobs"], item]
    return all(isinstance(one["token"], str) and isinstance(one["logprob"], int | float) for one in alternatives)
