"""The embedded moderator: scores answers in this process, without torch and without a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

from tta_middleware.aio import process as _process
from tta_middleware.errors import ConfigurationError, ModerationRejectedError
from tta_middleware.moderation.embedded.artifact import Artifact, load
from tta_middleware.moderation.embedded.language import language_supported
from tta_middleware.moderation.embedded.scoring import category_scores
from tta_middleware.moderation.embedded.text import words
from tta_middleware.moderation.embedded.windows import windowed_logits
from tta_middleware.types import CATEGORIES, Verdict

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ARTIFACT = "local.npz"
MODEL = "tta-local-2"
UNSUPPORTED_LANGUAGE = "unsupported-language"
INLINE_CHARACTERS = 8_000
"""Up to about this much text is scored on the event loop; it holds the loop for some milliseconds at most."""

LanguagePolicy = Literal["flag", "pass", "error"]


class EmbeddedModerator:
    """Scores texts by the 13 OpenAI category names; English only.

    Args:
        unsupported_language: what happens to a text for which ``language_supported`` is false. ``flag`` (default)
            adds the category ``unsupported-language`` with score 1 to the verdict, so that every policy treats
            the text as unsafe; ``pass`` scores it like any other; ``error`` raises.
        threshold: score from which a verdict is ``flagged``, in [0, 1].

    Raises:
        ConfigurationError: a setting is out of its range.
    """

    name = "local"
    default_threshold = 0.5
    categories = CATEGORIES
    max_characters = None

    def __init__(self, *, unsupported_language: LanguagePolicy = "flag", threshold: float = 0.5) -> None:
        if unsupported_language not in get_args(LanguagePolicy):
            raise ConfigurationError(
                f"unsupported_language must be 'flag', 'pass' or 'error', not {unsupported_language!r}"
            )
        if not 0.0 <= threshold <= 1.0:
            raise ConfigurationError(f"threshold must lie in [0, 1], not {threshold}")
        self._language = unsupported_language
        self._threshold = threshold
        self._warm = False

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        """One verdict per text, in order. ``prompt`` is accepted and not read: see the model card.

        Raises:
            ModerationRejectedError: a text's language is not supported and the setting is ``error``.
            ConfigurationError: the artifact cannot be read.
        """
        if self._warm and sum(map(len, texts)) <= INLINE_CHARACTERS:
            return self.score(texts)
        # The first call reads the artifact, which would hold the event loop as well.
        verdicts = await _process.calculate(self.score, texts)
        self._warm = True
        return verdicts

    def score(self, texts: Sequence[str]) -> list[Verdict]:
        """As :meth:`moderate`, for callers without an event loop."""
        return [self._verdict(text) for text in texts]

    async def aclose(self) -> None:
        """Nothing to release."""

    def _verdict(self, text: str) -> Verdict:
        tokens, artifact = words(text), load(ARTIFACT)
        scores = _scores(artifact, windowed_logits(artifact.logits, tokens), len(tokens))
        if self._language != "pass" and not language_supported(text):
            if self._language == "error":
                raise ModerationRejectedError(
                    "a text is not in English, the only language of the embedded moderator; use another moderator "
                    "or unsupported_language='flag' or 'pass'"
                )
            scores[UNSUPPORTED_LANGUAGE] = 1.0
        return Verdict(scores=scores, flagged=max(scores.values()) >= self._threshold, model=MODEL)


def _scores(artifact: Artifact, logits: NDArray[np.float64], count: int) -> dict[str, float]:
    if not count:
        return dict.fromkeys(CATEGORIES, 0.0)
    named = dict(zip(artifact.heads.names, logits.tolist(), strict=True))
    return category_scores(named, artifact.calibrations)
