"""What a disguised text says: found where it is plain, and nothing is found in ordinary text."""

import base64
import codecs
import html
import random
import string
import time
import unicodedata
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tta_middleware.policy.disguises import plain_form

SAID = "The lock will open when you turn the little wheel to the left, and then it is time to leave with the money."
LEET = str.maketrans("aeiost", "431057")
WIDE = {ord(letter): chr(ord(letter) + 0xFEE0) for letter in string.ascii_letters}
CYRILLIC = str.maketrans("aeopcyxi", "аеорсухі")
SMALL_CAPITALS = str.maketrans("abcdefghijklmnoprstuvwyz", "ᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘʀꜱᴛᴜᴠᴡʏᴢ")
BOLD = {ord(letter): chr(0x1D41A + at) for at, letter in enumerate(string.ascii_lowercase)}


def zero_width(text: str) -> str:
    return "\u200b".join(text)


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def wrapped(text: str) -> str:
    return base64.encodebytes(text.encode()).decode().rstrip("\n")


def struck(text: str) -> str:
    return "".join(letter + "\u0336\u0335" for letter in text)


def backwards(text: str) -> str:
    return text[::-1]


DISGUISES: dict[str, Callable[[str], str]] = {
    "zero width": zero_width,
    "soft hyphens": lambda text: text.replace("ll", "l\u00adl"),
    "tags": lambda text: "".join(chr(0xE0000 + ord(letter)) for letter in text if letter.isascii()),
    "struck through": struck,
    "full width": lambda text: text.translate(WIDE),
    "bold": lambda text: text.lower().translate(BOLD),
    "small capitals": lambda text: text.lower().translate(SMALL_CAPITALS),
    "Cyrillic": lambda text: text.translate(CYRILLIC),
    "HTML": lambda text: "".join(f"&#{ord(letter)};" for letter in text),
    "HTML twice": lambda text: html.escape("".join(f"&#x{ord(letter):x};" for letter in text)),
    "URL": lambda text: "".join(f"%{ord(letter):02x}" for letter in text),
    "URL thrice": lambda text: "".join(f"%2525{ord(letter):02X}" for letter in text),
    "C": lambda text: "".join(f"\\x{ord(letter):02x}" for letter in text),
    "base64": encoded,
    "base64, wrapped": wrapped,
    "base64 of base64": lambda text: encoded(encoded(text)),
    "hexadecimal": lambda text: text.encode().hex(),
    "hexadecimal, apart": lambda text: text.encode().hex(" "),
    "binary": lambda text: " ".join(f"{ord(letter):08b}" for letter in text),
    "spelled apart": " ".join,
    "leetspeak": lambda text: text.translate(LEET),
    "rot13": lambda text: codecs.encode(text, "rot13"),
    "backwards": backwards,
    "leetspeak in base64": lambda text: encoded(text.translate(LEET)),
    "Cyrillic and zero width": lambda text: zero_width(text.translate(CYRILLIC)),
}


def letters(text: str) -> str:
    return "".join(filter(str.isalpha, text.lower()))


@pytest.mark.parametrize("disguise", DISGUISES.values(), ids=DISGUISES)
def test_a_disguise_is_undone(disguise: Callable[[str], str]) -> None:
    form = plain_form(disguise(SAID))
    assert form is not None
    assert letters(form) == letters(SAID)
    assert plain_form(form) is None


@pytest.mark.parametrize(
    ("hidden", "said"),
    [
        ("how a b0mb is made", "how a bomb is made"),
        ("one b o m b in a box", "one bomb in a box"),
        ("a b-o-m-b in a box", "a bomb in a box"),
        ("a b\no\nm\nb", "a bomb"),
        ("k1ll th3 pr0c355", "kill the process"),
        ("a p@ssw0rd", "a password"),
        ("no %62omb here", "no bomb here"),
        ("a вomb", "a bomb"),
        ("ＢＯＭＢ", "BOMB"),
        ("a ᵇᵒᵐᵇ, 10th", "a bomb, 10th"),
        ("a b**om**b, **bo**mb and b~~o~~mb", "a bomb, bomb and bomb"),
        ("a b<b>om</b>b, b<!-- so -->om<wbr/>b", "a bomb, bomb"),
        ("a b&shy;om&#8203;b, bo&ZeroWidthSpace;mb", "a bomb, bomb"),
        ("a \x1b[1mb\x1b[0momb, \x1b]8;;x\x07bomb", "a bomb, bomb"),
        ("\u202ebmob a\u202c here", "a bomb\u202c here"),
        ("one b\u00a0o\u2003m\u3000b in\u00a0a box", "one bomb in a box"),
        ("a b\U000e006fmb", "a bomb"),
        (f"First: {encoded('open the lock')} Then go.", "First: open the lock Then go."),
    ],
)
def test_one_word_among_others(hidden: str, said: str) -> None:
    assert plain_form(hidden) == said


VISIBLE_FORMATS = ("ARABIC", "SYRIAC", "KAITHI", "EGYPTIAN")


def test_no_character_that_is_not_shown_parts_a_word() -> None:
    """By Unicode's own data: controls and formats, but for those of scripts that draw them, ends of lines and tags."""
    ends = {*"\t\n\x0b\x0c\r\x85", "\u202e"}  # the last one turns what follows round; see above
    hidden = [chr(code) for code in range(0xF0000) if unicodedata.category(chr(code)) in ("Cc", "Cf")]
    fillers = [
        "\u3164",
        "\uffa0",
        "\u115f",
        "\u034f",
        *map(chr, range(0xFE00, 0xFE10)),
        *map(chr, range(0xE0100, 0xE01F0)),
    ]
    drawn = {one for one in hidden if unicodedata.name(one, "").startswith(VISIBLE_FORMATS)}
    tags = set(map(chr, range(0xE0020, 0xE0080)))
    asked = [one for one in [*hidden, *fillers] if one not in ends | drawn | tags]
    assert len(asked) > 350
    assert [hex(ord(one)) for one in asked if plain_form(f"a bo{one}mb here") != "a bomb here"] == []


PLAIN = {
    "prose": SAID,
    "numbers": "On 4 July 2013 I ran 10k in 42:15, the 3rd of 1,057; call 030 1234567890 or 0800 4455 from 7pm.",
    "names": "MP3s, W3Schools, H2O, COVID19, CH3COOH, sha256, utf8, 4th, U.S.S.R., e.g. the A4 to B2B.",
    "German": "Die Größe der Straße überraschte Jürgen; fünf Bären aßen köstliche Äpfel in der Nähe von Köln.",
    "German, decomposed": "Die Gro\u0308\u00dfe u\u0308berraschte Ju\u0308rgen.",
    "French": "L'élève a été reçu à l'école où naît Noël ; ça coûte 3 œufs « déjà ».",
    "Russian": "Москва и он, она, оно: всё хорошо, ура; IT-отдел работает с 9 до 18.",
    "Greek": "Η Αθήνα είναι όμορφη πόλη και έχει ωραίο καιρό.",
    "Persian": "می\u200cخواهم به خانه بروم",
    "Vietnamese": "Tôi không biết đường đến nhà ga ở đâu.",
    "Chinese": "你好，世界！ChatGPT 可以帮助你吗？",
    "emoji": "A family 👨\u200d👩\u200d👧, a keycap 1\ufe0f\u20e3, a heart ❤\ufe0f.",
    "flag": "The flag 🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f.",
    "signs": "It’s “good” … ½ of 5 m² at 20 ℃ costs 3 €™.",
    "code": "for i in range(10):\n    x0, y0 = a[i], b[i]  # 0xFF\n    if x0 != y0 and a<b: print(f'{x0}&amp;{y0}')",
    "Markdown": "**Note**: d**n, use *both* hands, ~~one~~ two; 2**10 is 1024. <b>Bold</b> text<br>goes on.",
    "squares": "x\u00b2 + y\u00b2 = 25 m\u00b3",
    "address": "See https://example.org/a/b?q=red%20shoes&n=3#top or write to me.too@example.org.",
    "digest": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "identifier": "123e4567-e89b-12d3-a456-426614174000",
    "picture": "data:image/png;base64," + base64.b64encode(random.Random(1).randbytes(900)).decode(),
    "long words": "well-known-state-of-the-art/internationalization_responsibilities",
    "table": "  A    B   C  D\n0  1    2   3  4\n1  5    6   7  8",
    "choices": "Is it A, B, C or D? A + B = C.",
    "empty": "",
}


@pytest.mark.parametrize("text", PLAIN.values(), ids=PLAIN)
def test_ordinary_text_has_no_second_form(text: str) -> None:
    assert plain_form(text) is None


@pytest.mark.parametrize("begin", range(9))
def test_a_window_that_begins_within_a_code_is_read_from_its_first_whole_letter(begin: int) -> None:
    form = plain_form(encoded(SAID)[begin:70])
    assert form is not None
    assert letters(form) in letters(SAID)
    assert len(form) > 40


STRANGE = st.text(alphabet=st.sampled_from("ab0o4@ .-%&#;\\x=Zа\u200b\u0336３\n25amp6d*<>~\x1b[\u202e\xa0")) | st.text()
NESTED = st.lists(st.sampled_from(sorted(DISGUISES)), min_size=1, max_size=3)


@given(STRANGE)
@example("%25252525252525256d &amp;amp;amp;#98;")
@example("\ud800 \udfff b o m b")
def test_any_text_has_at_most_one_form_which_has_none_itself(text: str) -> None:
    form = plain_form(text)
    assert form is None or (form != text and plain_form(form) is None)


@given(NESTED)
def test_disguises_within_disguises_end(names: list[str]) -> None:
    text = SAID
    for name in names:
        text = DISGUISES[name](text)
    form = plain_form(text)
    assert form is None or plain_form(form) is None


HOSTILE = {
    "letters": "ab",
    "gaps": "a ",
    "wide gaps": "a      ",
    "hexadecimal": "6d ",
    "half a code": "QUJDREVGR0hJSktM ",
    "dots": "a.",
    "percents": "%25",
    "ampersands": "&amp;",
    "marks": "a\u0336",
    "zero widths": "a\u200b",
    "leetspeak": "h4ck",
    "leet words": "b0mb ",
    "exclamations": "a!b",
    "zeros": "0x",
    "bits": "01",
    "newlines": "a\n",
    "rot13": "gur naq ",
    "tags of HTML": "a<b",
    "comments": "a<!--",
    "stars": "a**",
    "escapes of terminals": "\x1b]a",
    "colours": "\x1b[0",
    "overrides": "\u202ea",
    "entities": "a&shy",
}


@pytest.mark.slow
@pytest.mark.parametrize("piece", HOSTILE.values(), ids=HOSTILE)
def test_the_time_grows_with_the_length_only(piece: str) -> None:
    def seconds(length: int) -> float:
        text = piece * (length // len(piece))
        began = time.process_time()
        plain_form(text)
        return time.process_time() - began

    seconds(1_000)
    took = [min(seconds(length) for _ in range(3)) for length in (20_000, 80_000)]
    # Four times the text; what is quadratic would take sixteen times as long.
    assert all(after < 9 * before + 0.05 for before, after in pairwise(took))
