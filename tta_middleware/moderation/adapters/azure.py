"""Azure AI Content Safety.

Source: https://learn.microsoft.com/rest/api/contentsafety/text-operations/analyze-text (2024-09-01)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from tta_middleware.errors import InvalidVerdictError
from tta_middleware.moderation.adapters.http import HTTPModerator
from tta_middleware.moderation.request_size import without_blanks
from tta_middleware.moderation.retry import RetryPolicy
from tta_middleware.moderation.transport import QuietText, Transport
from tta_middleware.policy.verdicts import in_parts
from tta_middleware.types import Verdict

CATEGORY_NAMES = {"Hate": "hate", "SelfHarm": "self-harm", "Sexual": "sexual", "Violence": "violence"}

_API_VERSION = "2024-09-01"
_MOST_SEVERE = 7


class AzureContentSafetyModerator(HTTPModerator):
    """Severities 0 to 7 in four categories, divided by 7.

    The default threshold lies between severities 3 and 4: the service's own 'medium'. Texts above the service's
    10,000 characters are scored in parts that overlap, and the largest score of each category counts.

    Args:
        endpoint: such as ``https://name.cognitiveservices.azure.com``.
        api_key: None takes AZURE_CONTENT_SAFETY_KEY at the first request.
        timeout: seconds for one attempt.
        concurrency: texts scored at once; each is one request.
    """

    default_threshold = 0.5
    max_characters = 10_000
    categories = tuple(CATEGORY_NAMES.values())

    def __init__(
        self,
        endpoint: str,
        *,
        api_key: str | None = None,
        timeout: float = 10.0,
        retry: RetryPolicy | None = None,
        concurrency: int = 8,
    ) -> None:
        transport = Transport(
            base_url=f"{endpoint.rstrip('/')}/contentsafety",
            api_key=api_key,
            key_variable="AZURE_CONTENT_SAFETY_KEY",
            key_header="Ocp-Apim-Subscription-Key",
            timeout=timeout,
        )
        super().__init__(transport, retry, concurrency)
        self.name = "azure-content-safety"

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        """One verdict per text; ``prompt`` is not sent."""
        each = partial(self._each, score=self._score)
        score = partial(without_blanks, categories=self.categories, model=self.name, score=each)
        return await in_parts(texts, score, self.max_characters)

    async def _score(self, text: str) -> Verdict:
        scores = await self._analyse(text)
        return Verdict(scores=scores, flagged=max(scores.values()) >= self.default_threshold, model=self.name)

    async def _analyse(self, text: str) -> dict[str, float]:
        body = {
            "text": QuietText.of(text),
            "categories": list(CATEGORY_NAMES),
            "outputType": "EightSeverityLevels",
        }
        payload = await self._post("/text:analyze", body, {"api-version": _API_VERSION})
        return parse_severities(payload, self._transport.where)


def parse_severities(payload: Any, where: str) -> dict[str, float]:
    """Scores from ``{"categoriesAnalysis": [{"category", "severity"}]}``.

    Raises:
        InvalidVerdictError: a category is missing or a severity is not a whole number from 0 to 7.
    """
    items = payload.get("categoriesAnalysis") if isinstance(payload, dict) else None
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise InvalidVerdictError(f"{where} gave no categoriesAnalysis")
    scores: dict[str, float] = {}
    for name, ours in CATEGORY_NAMES.items():
        severities = [item.get("severity") for item in items if item.get("category") == name]
        usable = [severity for severity in severities if type(severity) is int and 0 <= severity <= _MOST_SEVERE]
        if not usable or len(usable) < len(severities):
            raise InvalidVerdictError(f"{where} gave no usable severity for {name}")
        scores[ours] = max(usable) / _MOST_SEVERE
    return scores
