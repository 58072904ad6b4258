"""Whether a text is in a language that the embedded models were trained on: English.

A coarse signal by script and function words, no language identification. It exists so that a text the models
cannot read does not pass as safe because none of its words is known to them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

LATIN_END = 0x024F
MIN_LETTERS = 12
MIN_FOREIGN_LETTERS = 120
MIN_FUNCTION_WORDS = 4

_ENGLISH_WORDS = """
the of and to in is that it was for on are as with his they at be this have from or had by but what some we
can out other were all there when use your how said an each she which do their if will up about many then
them would so these her him has more could my than been who its now find did get may over you i not no
"""
# German, Dutch, Nordic; French, Spanish, Portuguese, Italian, Romanian, Catalan; Polish, Czech, Turkish,
# Indonesian, Vietnamese, Finnish, Hungarian.
_OTHER_WORDS = """
der die das und ist nicht ein eine einen mit für auf dem den von zu sie ich wir auch wird sind oder wie wenn
het een niet van voor aan zijn maar ook naar deze bij och att det som för är inte på jag med har om ikke
af jeg til på vi kan sie ihre
le la les des du et est une dans pour que qui pas sur avec vous nous je ce cette sont ou plus el los las del
en un una por con para como es su se lo al más pero não uma os do da em com mais dos o e il gli che di non per
sono della questo si și în pe cu care els amb
nie się jest na w z i że jak to ve bir bu için ile da de yang dan untuk dengan tidak ini itu dari và của là
không một các cho được ja on ei että se hän az és hogy nem egy
"""
_AMBIGUOUS = frozenset({"die", "den", "to", "on", "do", "an", "i", "as", "so", "w", "z"})
_ENGLISH = frozenset(_ENGLISH_WORDS.split())
_OTHERS = frozenset(_OTHER_WORDS.split()) - _ENGLISH - _AMBIGUOUS
_LETTERS = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True, slots=True)
class Reading:
    """What the signal counts.

    Attributes:
        letters: letters in all.
        foreign: letters in words without a Latin letter.
        english: English function words.
        other: function words of other languages, and words with accented Latin letters.
    """

    letters: int = 0
    foreign: int = 0
    english: int = 0
    other: int = 0

    @classmethod
    def of(cls, text: str) -> Reading:
        runs = _LETTERS.findall(text)
        plain = [run.lower() for run in runs]
        return cls(
            letters=sum(map(len, runs)),
            foreign=sum(len(run) for run in runs if not run.isascii() and min(map(ord, run)) > LATIN_END),
            english=sum(run in _ENGLISH for run in plain),
            other=sum(run in _OTHERS or _accented(run) for run in plain),
        )

    @property
    def supported(self) -> bool:
        if self.foreign >= MIN_FOREIGN_LETTERS or self.foreign * 5 >= max(self.letters, MIN_LETTERS):
            return False
        return self.other < MIN_FUNCTION_WORDS or 2 * self.other <= 3 * self.english


def _accented(run: str) -> bool:
    return not run.isascii() and any("\x7f" < letter <= chr(LATIN_END) for letter in run)


def language_supported(text: str) -> bool:
    """False if a good part of ``text`` is in another script or reads like another language than English.

    Texts without enough letters to tell (numbers, symbols, a few words) count as supported. Char soup and made-up
    words do, too: they belong to no language, and a measure of quality judges them.
    """
    return Reading.of(text).supported
