"""The Mistral moderation API.

Source: https://docs.mistral.ai/capabilities/guardrailing
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from tta_middleware.moderation.adapters.http import HTTPModerator
from tta_middleware.moderation.concurrency import gather
from tta_middleware.moderation.openai import parse_moderations
from tta_middleware.moderation.request_size import BatchLimits, checked_limit, split, without_blanks
from tta_middleware.moderation.retry import RetryPolicy
from tta_middleware.moderation.transport import QuietText, Transport
from tta_middleware.policy.verdicts import in_parts
from tta_middleware.types import Verdict

CATEGORY_NAMES = {
    "sexual": "sexual",
    "hate_and_discrimination": "hate",
    "violence_and_threats": "violence",
    "dangerous_and_criminal_content": "illicit",
    "selfharm": "self-harm",
}
"""The categories that are about harm."""

TOPICS = ("health", "financial", "law", "pii")
"""Those that are about topics; the API's names are also ours."""


class MistralModerator(HTTPModerator):
    """Scores per category; a list of texts is one request.

    The default threshold is this package's choice: the API publishes flags, not the thresholds behind them.

    Args:
        topics: also report the categories about topics, under the API's names; they then count like any other.
        api_key: None takes MISTRAL_API_KEY at the first request.
        timeout: seconds for one attempt.
        limits: bounds of one request.
        max_characters: longer texts go as parts that overlap; the default keeps to the models' 8,192 tokens in any
            script.
    """

    default_threshold = 0.5

    def __init__(
        self,
        model: str = "mistral-moderation-latest",
        *,
        base_url: str = "https://api.mistral.ai/v1",
        api_key: str | None = None,
        timeout: float = 10.0,
        retry: RetryPolicy | None = None,
        limits: BatchLimits | None = None,
        topics: bool = False,
        max_characters: int | None = 4_000,
    ) -> None:
        transport = Transport(base_url=base_url, api_key=api_key, key_variable="MISTRAL_API_KEY", timeout=timeout)
        super().__init__(transport, retry)
        self.model = model
        self.name = f"mistral/{model}"
        self._limits = limits or BatchLimits()
        self._topics = topics
        self.categories = (*CATEGORY_NAMES.values(), *(TOPICS if topics else ()))
        self.max_characters = checked_limit(max_characters)

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        """One verdict per text; ``prompt`` is not sent."""
        categories = CATEGORY_NAMES.values()
        score = partial(without_blanks, categories=categories, model=self.model, score=self._score)
        return await in_parts(texts, score, self.max_characters)

    async def _score(self, texts: Sequence[str]) -> list[Verdict]:
        groups = split(texts, self._limits)
        answers = await gather([partial(self._request, group) for group in groups])
        return [verdict for answer in answers for verdict in answer]

    async def _request(self, texts: Sequence[str]) -> list[Verdict]:
        body = {"model": self.model, "input": [QuietText.of(text) for text in texts]}
        return parse_moderations(
            await self._post("/moderations", body),
            len(texts),
            categories=tuple(CATEGORY_NAMES.values()),
            model=self.model,
            where=self._transport.where,
            rename=self._rename,
        )

    def _rename(self, scores: Mapping[str, Any]) -> dict[str, Any]:
        return {
            CATEGORY_NAMES.get(name, name): score
            for name, score in scores.items()
            if self._topics or name in CATEGORY_NAMES
        }
