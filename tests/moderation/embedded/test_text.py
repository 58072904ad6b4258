"""How texts are read: disguises, languages, and nothing that depends on the run."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tta_middleware.moderation.embedded import language_supported
from tta_middleware.moderation.embedded.text import words


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("I can't", ["i", "can't"]),
        ("h4ck the k1ll", ["hack", "the", "kill"]),
        ("b-o-m-b", ["bomb"]),
        ("k i l l", ["kill"]),
        ("\ufb01ne \uff21\uff22", ["fine", "ab"]),
        ("bo\u200bmb", ["bomb"]),
        ("pаypаl", ["paypal"]),  # noqa: RUF001
        ("1. 2. 10.", ["0", "0", "0"]),
        ("1 2 3 4", ["0", "0", "0", "0"]),
        ("covid19 mp3 2nd", ["covid19", "mp3", "2nd"]),
        ("Привет", ["привет"]),
        ("", []),
    ],
)
def test_words(written: str, read: list[str]) -> None:
    assert words(written) == read


@given(st.text())
def test_any_text_can_be_read(text: str) -> None:
    language_supported(text)
    assert all(words(text))


ENGLISH = (
    "The quick brown fox jumps over the lazy dog.",
    "Café, naïve and résumé are English words, too.",
    "xkq zzp wrrt bnm lkjh qwpo",
    "1. 1. 1. 1.",
    "",
    "OK",
    "def add(a, b): return a + b",
    "The word 'Zeitgeist' and the phrase 'déjà vu' come from other languages.",
    "See the Russian word «мир», which means peace and world, in a long English sentence about translation.",
)
OTHERS = (
    "Heute ist das Wetter schön, und wir gehen mit dem Hund in den Park.",
    "Aujourd'hui il fait beau et nous allons dans le parc avec le chien.",
    "Hoy hace buen tiempo y vamos al parque con el perro para jugar.",
    "Oggi il tempo è bello e andiamo con il cane nel parco per giocare.",
    "Hoje o tempo não está mau e vamos com o cão para o parque.",
    "Vandaag is het weer niet slecht en wij gaan met een hond naar het park.",
    "Dziś jest ładnie i idziemy z psem do parku, nie jest zimno, to się zdarza.",
    "今天天气很好，我们带着狗去公园散步吧。",  # noqa: RUF001
    "اليوم الجو جميل وسنذهب إلى الحديقة مع الكلب",
    "आज मौसम अच्छा है और हम पार्क जा रहे हैं",
    "오늘은 날씨가 좋아서 공원에 산책하러 갑니다",
    "Сегодня хорошая погода, и мы идём гулять.",
)


@pytest.mark.parametrize("text", ENGLISH)
def test_english_and_no_language_at_all_are_supported(text: str) -> None:
    assert language_supported(text)


@pytest.mark.parametrize("text", OTHERS)
def test_other_languages_are_not(text: str) -> None:
    assert not language_supported(text)


def test_a_paragraph_in_another_script_inside_english_is_noticed() -> None:
    assert not language_supported("This is a long English answer. " * 40 + OTHERS[-1] * 4)


def test_scores_do_not_depend_on_the_hash_seed() -> None:
    code = (
        "from tta_middleware.moderation.embedded import EmbeddedModerator;"
        "print(EmbeddedModerator().score(['a stupid dragon burned the village'])[0].scores)"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1
