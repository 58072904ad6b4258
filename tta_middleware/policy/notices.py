"""The notice that stands in for an answer, in the language of the question.

The language is read off the script and the function words of the question, which is no language identification: it is
meant to be right where it says something, and says nothing where a question is short, mixed, or in another language.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

DEFAULT_NOTICE = "I can't help with that request."

NOTICES: Mapping[str, str] = {
    "ar": "لا يمكنني المساعدة في هذا الطلب.",
    "de": "Bei dieser Anfrage kann ich nicht helfen.",
    "es": "No puedo ayudar con esa solicitud.",
    "fr": "Je ne peux pas répondre à cette demande.",
    "hi": "मैं इस अनुरोध में मदद नहीं कर सकता।",
    "it": "Non posso aiutare con questa richiesta.",
    "ja": "そのご依頼にはお応えできません。",
    "ko": "그 요청은 도와드릴 수 없습니다.",
    "nl": "Ik kan niet helpen met dat verzoek.",
    "pl": "Nie mogę pomóc w tej sprawie.",
    "pt": "Não posso ajudar com esse pedido.",
    "ru": "Я не могу помочь с этим запросом.",
    "sv": "Jag kan inte hjälpa till med den förfrågan.",
    "tr": "Bu istek konusunda yardımcı olamam.",
    "uk": "Я не можу допомогти з цим запитом.",
    "vi": "Tôi không thể giúp với yêu cầu đó.",
    "zh": "我无法协助处理该请求。",
}
"""The default notice in other languages, by ISO 639-1 code."""

LANGUAGES: tuple[str, ...] = ("en", *NOTICES)
"""What :func:`language_of` tells apart."""

READ = 2_000
"""Characters of a question that are looked at."""

_WORDS = {
    "en": (
        "the and is are what how do does can you to of in for with my i me it this that write tell give make "
        "why explain be as we our your they or not if"
    ),
    "de": (
        "der die das und ist nicht ein eine einen wie was ich kann man mir zu auf mit für von den bitte warum "
        "wo du erkläre schreib gib sag kannst"
    ),
    "es": (
        "el la los las que es y en un una cómo como qué puedo para por con mi de del se cuál dónde me hacer "
        "sin explica escribe dime dame puedes"
    ),
    "fr": (
        "le la les des du et est une un je comment que quoi pour dans avec mon ma puis de pas quel quelle où "
        "qui moi comment explique donne écris dis"
    ),
    "it": (
        "il lo la gli le che è e un una come cosa posso per con mio mia di del della non dove quale mi fare "
        "sono spiega scrivi dimmi puoi"
    ),
    "nl": (
        "de het een en is niet hoe wat ik kan je mijn voor met van op te dat waar waarom zijn maak aan wij "
        "naar leg schrijf geef kun vertel"
    ),
    "pl": (
        "i w na jest nie jak co się do z że czy mogę dla o po to gdzie mi mój który dlaczego są napisz wyjaśnij powiedz"
    ),
    "pt": (
        "o os as que é e em um uma como posso para por com meu minha de do da não onde qual me fazer eu você "
        "explique escreva diga pode fazer"
    ),
    "sv": (
        "och är en ett det att hur vad jag kan man inte för med på av min mig som var den till varför vill "
        "förklara skriv berätta"
    ),
    "tr": (
        "ve bir bu için nasıl ne mi mı nedir ile bana ben da de çok var yok olan neden hangi gibi kadar "
        "yapılır açıkla yaz anlat"
    ),
    "vi": "là và của có cho một những được không làm thế nào tôi với trong cách như để này khi gì",
}


def _languages_by_word() -> dict[str, tuple[str, ...]]:
    known: dict[str, tuple[str, ...]] = {}
    for language, words in _WORDS.items():
        for word in words.split():
            known[word] = (*known.get(word, ()), language)
    return known


_LANGUAGES_OF_WORD = _languages_by_word()
_SIGNS = {"¿": "es", "¡": "es", "ñ": "es", "ß": "de", "ã": "pt", "õ": "pt", "ł": "pl", "ę": "pl", "ğ": "tr", "ş": "tr",
          "å": "sv", "œ": "fr", "ơ": "vi", "ư": "vi", "đ": "vi"}  # fmt: skip
_LETTERS = re.compile(r"[^\W\d_]+")
_SCRIPTS = {
    "latin": re.compile("[A-Za-z\u00c0-\u024f\u1e00-\u1eff]"),
    "cyrillic": re.compile("[\u0400-\u04ff]"),
    "arabic": re.compile("[\u0600-\u06ff]"),
    "devanagari": re.compile("[\u0900-\u097f]"),
    "hangul": re.compile("[\u1100-\u11ff\uac00-\ud7af]"),
    "kana": re.compile("[\u3040-\u30ff]"),
    "han": re.compile("[\u4e00-\u9fff]"),
}
_UKRAINIAN = re.compile("[іїєґ]", re.IGNORECASE)
_RUSSIAN = re.compile("[ыэё]|\\b(?:и|как|что|это|не|на|мне|для|сделать|я)\\b", re.IGNORECASE)
_NOT_ARABIC = re.compile("[پچژگٹڈڑںےکی]")  # Persian and Urdu
_HINDI = re.compile("है|हैं|में|का|के|की|को|कैसे|क्या")
_LEAST_WORDS = 2
_LEAST_SHARE = 0.2


def language_of(text: str) -> str | None:
    """ISO 639-1 code of the language that ``text`` is plainly in, one of :data:`LANGUAGES`; None where it is unsure."""
    text = text[:READ]
    counts = {script: len(letters.findall(text)) for script, letters in _SCRIPTS.items()}
    script = max(counts, key=lambda name: counts[name])
    if not counts[script] or 2 * (counts[script] + (counts["kana"] if script == "han" else 0)) < sum(counts.values()):
        return None
    match script:
        case "latin":
            return _latin(text)
        case "cyrillic":
            return _cyrillic(text)
        case "arabic":
            return None if _NOT_ARABIC.search(text) else "ar"
        case "devanagari":
            return "hi" if _HINDI.search(text) else None
        case "hangul":
            return "ko"
        case _:  # Japanese is written in Chinese characters between kana, Chinese without any
            return "ja" if 10 * counts["kana"] > counts["han"] else "zh"


def _latin(text: str) -> str | None:
    """By function words, and by letters that a single one of the languages has."""
    words = [word.lower() for word in _LETTERS.findall(text)]
    found = Counter(language for word in words for language in _LANGUAGES_OF_WORD.get(word, ()))
    found.update(language for sign, language in _SIGNS.items() if sign in text.lower())
    ranked = [*found.most_common(2), ("", 0), ("", 0)]
    (language, most), (_, second) = ranked[0], ranked[1]
    sure = most >= max(_LEAST_WORDS, _LEAST_SHARE * len(words)) and most > second
    return language if sure else None


def _cyrillic(text: str) -> str | None:
    """Russian and Ukrainian by their own letters; Bulgarian, Serbian and others have neither's."""
    if _UKRAINIAN.search(text):
        return None if re.search("[ыэё]", text.lower()) else "uk"
    return "ru" if _RUSSIAN.search(text) else None


def notice_in(language: str | None, notice: str, notices: Mapping[str, str]) -> str:
    """The notice for a language: the operator's own, or what is shipped where the default one was left as it is."""
    if language is None:
        return notice
    shipped = NOTICES.get(language, notice) if notice == DEFAULT_NOTICE else notice
    return notices.get(language, shipped)
