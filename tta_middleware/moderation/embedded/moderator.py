"""The embedded moderator: scores answers in this process, without torch and without a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

from tta_middleware.aio import process as _process
from tta_middleware.errors import ConfigurationError, ModerationRejectedError
from tta_middleware.moderation.embedded.artifact import Artifact, load
from tta_middleware.moderation.embedded.language import Reading
from tta_middleware.moderation.embedded.scoring import category_scores
from tta_middleware.moderation.embedded.text import words
from tta_middleware.moderation.embedded.windows import GrowingLogits, windowed_logits
from tta_middleware.types import CATEGORIES, Verdict

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ARTIFACT = "local.npz"
MODEL = "tta-local-1"
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

    def growing(self) -> GrowingVerdict:
        """A fresh scorer for one text that arrives in pieces, such as a streaming answer."""
        return GrowingVerdict(self)

    async def aclose(self) -> None:
        """Nothing to release."""

    def verdict(self, logits: NDArray[np.float64], count: int, reading: Reading) -> Verdict:
        """The verdict on a text with ``count`` words, given its (heads,) logits and its reading.

        Raises:
            ModerationRejectedError: as :meth:`moderate`.
        """
        scores = _scores(load(ARTIFACT), logits, count)
        if self._language != "pass" and not reading.supported:
            if self._language == "error":
                raise ModerationRejectedError(
                    "a text is not in English, the only language of the embedded moderator; use another moderator "
                    "or unsupported_language='flag' or 'pass'"
                )
            scores[UNSUPPORTED_LANGUAGE] = 1.0
        return Verdict(scores=scores, flagged=max(scores.values()) >= self._threshold, model=MODEL)

    def _verdict(self, text: str) -> Verdict:
        tokens = words(text)
        return self.verdict(windowed_logits(load(ARTIFACT).heads, tokens), len(tokens), Reading.of(text))


class GrowingVerdict:
    """Scores a text that grows; not for use by several threads at once.

    ``extend(a); extend(b)`` gives exactly the verdict of ``score([a + b])``, for the price of ``b``.
    """

    def __init__(self, moderator: EmbeddedModerator) -> None:
        self._moderator = moderator
        self._logits = GrowingLogits(load(ARTIFACT).heads)
        self._reading = Reading()
        self._word = ""

    def extend(self, text: str) -> Verdict:
        """Append ``text``; the verdict on everything so far.

        Raises:
            ModerationRejectedError: the language is not supported and the setting is ``error``.
        """
        logits, count = self._logits.extend(text)
        # The last run of letters may go on in the next piece, so it is counted again with it.
        joined = self._word + text
        rest = _start_of_last_word(joined)
        self._reading += Reading.of(joined[:rest])
        self._word = joined[rest:]
        return self._moderator.verdict(logits, count, self._reading + Reading.of(self._word))


def _start_of_last_word(text: str) -> int:
    """Where the run of letters at the end of ``text`` begins."""
    place = len(text)
    while place and text[place - 1].isalnum() and not text[place - 1].isdecimal():
        place -= 1
    return place


def _scores(artifact: Artifact, logits: NDArray[np.float64], count: int) -> dict[str, float]:
    if not count:
        return dict.fromkeys(CATEGORIES, 0.0)
    named = dict(zip(artifact.heads.names, logits.tolist(), strict=True))
    return category_scores(named, artifact.calibrations)
