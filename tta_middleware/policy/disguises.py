"""What a disguised text says: the one place that undoes what people do to words so that no moderator knows them.

    plain_form("a b0mb")      -> "a bomb"
    plain_form("b o m b")     -> "bomb"
    plain_form("a bath bomb") -> None: it says what it says

Undone is what has one plain reading: invisible characters and marks of formatting within words, overrides of the
direction, stacked accents, letters of other alphabets and of Unicode's mathematical, circled, raised and full-width
ones that look like Latin, escapes of HTML, URLs, terminals and C, base64, hexadecimal and binary codes of readable
text, letters spelled apart, leetspeak, rot13 and words written backwards, and each of these within another. What is not
undone, and what it costs, stands in docs/moderation.md.

A form is judged beside the text as it was written and never in place of it (:mod:`tta_middleware.policy.coverage`), so
a wrong guess can raise a score but cannot lower one. Ordinary text has no second form and costs no second verdict.

Every function is total and takes time in proportion to the length of its text: no pattern here tries a stretch more
often than a fixed number of times.
"""

from __future__ import annotations

import binascii
import re
import unicodedata
from collections.abc import Callable
from functools import cache
from html import unescape
from urllib.parse import unquote

LEVELS = 12
"""Disguises within disguises that are undone; base64 of base64 that deep has grown thirtyfold."""

LEAST_CODE = 16
"""Characters of a code (base64, hexadecimal) that are looked at; shorter runs are words and numbers."""

_LEAST_LETTERS = 4
"""Letters spelled apart that make a word; three are an enumeration."""


def plain_form(text: str) -> str | None:
    """What ``text`` says without its disguises; None where it wears none. A form has no further form."""
    form = text
    for _ in range(LEVELS):
        before = form
        for undo in _UNDOING:
            form = undo(form)
        if form == before:
            break
    return form if form != text else None


# Invisible characters and stacked accents

# What Unicode calls ignorable or a control, but for ends of lines, tabs, and the tags that spell something.
_INVISIBLE = (
    "\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    "\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e001f\U000e0080-\U000e0fff"
)
_LATIN_LIKE = "0-9A-Za-z\u00c0-\u024f\u0370-\u052f"
# Within a word of a script that has no use for them: Persian and Hindi join letters so, and emoji their parts.
_WITHIN_WORD = re.compile(f"(?<=[{_LATIN_LIKE}])[{_INVISIBLE}]+(?=[{_LATIN_LIKE}])")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f]")
_ALL_INVISIBLE = re.compile(f"[{_INVISIBLE}]")
_TAGS = re.compile("(?<![\U0001f3f4\U000e0020-\U000e007e])[\U000e0020-\U000e007e]+")  # beside those of flags
_OVERRIDDEN = re.compile("\u202e([^\u202a-\u202e\u2066-\u2069\n]*)")
# Colours and links of terminals, comments and inline tags of HTML, and Markdown's bold and struck through.
_TERMINAL = re.compile(r"\x1b(?:\[[0-?]{0,32}[ -/]{0,8}[@-~]|\][^\x07\x1b\n]*(?:\x07|\x1b\\))")
_INLINE = r"</?(?:a|b|big|code|del|em|font|i|ins|mark|s|small|span|strong|sub|sup|tt|u|wbr)(?:\s[^<>]{0,200})?/?>"
_LETTER_LIKE = _LATIN_LIKE.removeprefix("0-9")
_MARKUP = re.compile(f"(?<=[{_LETTER_LIKE}])(?:<!--[^<>]{{0,200}}-->|{_INLINE})+(?=[{_LETTER_LIKE}])", re.IGNORECASE)
# A part of a word between two marks; masked words (``f**k``) have one.
_MARKDOWN = re.compile(
    rf"(?<=[{_LETTER_LIKE}])(\*{{2,3}}|~~)(\w{{1,40}})\1|(?<![*~])(\*{{2,3}}|~~)(\w{{1,40}})\3(?=[{_LETTER_LIKE}])"
)
_MARK = "\u0300-\u036f\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f"
_MARKS = re.compile(f"[{_MARK}]")
_MARKED = re.compile(f"[A-Za-z\u00c0-\u02ff\u0370-\u052f][{_MARK}]")
_WORD = re.compile(r"\w+")
_SOLID = re.compile(r"\S+")


def _without_invisible(text: str) -> str:
    """Invisible characters are dropped everywhere once one of them stands within a word.

    Tags become what they tag, and what is shown from right to left by an override is turned round.
    """
    if text.isascii() and not _CONTROL.search(text):
        return text
    text = _TERMINAL.sub("", text)
    text = _OVERRIDDEN.sub(lambda run: run[1][::-1], text)
    text = _TAGS.sub(lambda tags: "".join(chr(ord(tag) - 0xE0000) for tag in tags.group()), text)
    return _ALL_INVISIBLE.sub("", text) if _WITHIN_WORD.search(text) else text


def _without_markup(text: str) -> str:
    """Words without the marks of formatting inside them, which nobody sees once the text is shown."""
    text = _MARKUP.sub("", text) if "<" in text else text
    return _MARKDOWN.sub(r"\2\4", text) if "**" in text or "~~" in text else text


def _without_marks(text: str) -> str:
    """Words whose accents no letter of any alphabet carries lose all of them; ``ü`` and ``ế`` are letters."""
    if text.isascii() or not _MARKS.search(text):
        return text
    return _SOLID.sub(lambda word: _unmarked(word.group()), text)


def _unmarked(word: str) -> str:
    if not _MARKED.search(unicodedata.normalize("NFC", word)):
        return word  # well written, or of a script that is written so
    return _MARKS.sub("", unicodedata.normalize("NFD", word))


# Letters that look like Latin ones

_LETTER_RANGES = (
    (0x02B0, 0x02B8),
    (0x1D2C, 0x1D6A),
    (0x1D78, 0x1DBF),
    (0x2071, 0x2071),
    (0x207F, 0x207F),
    (0x2090, 0x209C),
    (0x2100, 0x218F),
    (0x24B6, 0x24E9),
    (0xFF10, 0xFF19),
    (0xFF21, 0xFF3A),
    (0xFF41, 0xFF5A),
    (0x1D400, 0x1D7FF),
    (0x1F110, 0x1F149),
)
_SMALL_CAPITALS = dict(zip("ᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘʀꜱᴛᴜᴠᴡʏᴢɑɡ", "abcdefghijklmnoprstuvwyzag", strict=True))
_LOOKALIKES = dict(zip("аеорсухіјѕԁһӏԛԝАВЕКМНОРСТХУІЈЅοανρυικΑΒΕΖΗΙΚΜΝΟΡΤΥΧ",
                       "aeopcyxijsdhlqwABEKMHOPCTXYIJSoavpuikABEZHIKMNOPTYX", strict=True))  # fmt: skip
# Less alike, so read as Latin in words that have Latin letters only.
_FAINT_LOOKALIKES = dict(zip("вкмтнгпиетηετχγωβ", "bkmthrnuetnetxywb", strict=True))
_LEAST_ALIKE = 3
_CYRILLIC_OR_GREEK = re.compile("[\u0370-\u052f]")


@cache
def _styled() -> dict[int, str]:
    """Letters of Unicode that are Latin ones in another style; ``™`` and ``½`` are none."""
    styled = {ord(key): value for key, value in _SMALL_CAPITALS.items()}
    styled |= {0x1F130 + at + shift: chr(65 + at) for at in range(26) for shift in (0, 0x20, 0x40)}
    for first, last in _LETTER_RANGES:
        for code in range(first, last + 1):
            plain = unicodedata.normalize("NFKC", chr(code))
            if len(plain) == 1 and plain.isascii() and plain != chr(code):
                styled[code] = plain
    return styled


def _in_latin(text: str) -> str:
    if text.isascii():
        return text
    plain = text.translate(_styled())
    if not _CYRILLIC_OR_GREEK.search(plain):
        return plain
    foreign = len(_CYRILLIC_OR_GREEK.findall(plain))
    latin = sum(character.isascii() and character.isalpha() for character in plain)
    return _WORD.sub(lambda word: _latin_word(word.group(), mostly_latin=latin > foreign), plain)


def _latin_word(word: str, *, mostly_latin: bool) -> str:
    """A word in Latin letters if all its others look like them, and it or the text has Latin ones as well."""
    if word.isascii():
        return word
    own = any(character.isascii() and character.isalpha() for character in word)
    alike = _LOOKALIKES | _FAINT_LOOKALIKES if own else _LOOKALIKES
    beside_latin = own or (mostly_latin and len(word) >= _LEAST_ALIKE)
    if not beside_latin or any(not letter.isascii() and letter not in alike for letter in word):
        return word
    return "".join(alike.get(letter, letter) for letter in word)


# Escapes

_ENTITY = re.compile(r"&#(?:[xX]0{0,6}[46-7][0-9a-fA-F](?![0-9a-fA-F])|0{0,6}(?:6[5-9]|[7-9]\d|1[01]\d|12[0-2])(?!\d))")
_HIDDEN_ENTITY = re.compile(rf"(?<=[{_LATIN_LIKE}])&(?:#[xX]?[0-9a-fA-F]{{1,8}}|[A-Za-z]{{2,24}});(?=[{_LATIN_LIKE}&])")
_AMPERSANDS = re.compile(r"&(?:amp;)+(?=#)")
_PERCENTS = re.compile(r"%(?:25)+(?=[0-9a-fA-F]{2})")
_PERCENT = re.compile(r"%[0-9a-fA-F]{2}")
_PERCENT_LETTER = re.compile(r"%(?:[46][1-9a-fA-F]|[57][0-9aA])")
_LEAST_ESCAPES = 3
_BYTES = re.compile(r"(?:\\x[0-9a-fA-F]{2}){3,}")


def _unescaped(text: str) -> str:
    """Escapes that stand for letters, which nobody has to escape; ``&amp;`` and ``%20`` by themselves may stay."""
    if "&" in text:
        text = _AMPERSANDS.sub("&", text)
        text = _HIDDEN_ENTITY.sub(lambda entity: _visible(entity.group()), text)
        text = unescape(text) if _ENTITY.search(text) else text
    if "%" in text:
        text = _SOLID.sub(lambda word: _unquoted(word.group()), text)
    return _BYTES.sub(lambda run: _from_hex(run.group()) or run.group(), text) if "\\x" in text else text


def _visible(entity: str) -> str:
    """An entity, unless it stands for something invisible."""
    return "" if _ALL_INVISIBLE.fullmatch(unescape(entity)) else entity


def _unquoted(word: str) -> str:
    single = _PERCENTS.sub("%", word)
    if _PERCENT_LETTER.search(single) or len(_PERCENT.findall(single)) >= _LEAST_ESCAPES:
        return unquote(single)
    return word


# Codes

_BASE64 = re.compile(rf"[A-Za-z0-9+/_-]{{{LEAST_CODE},}}={{0,2}}")
_PAIR = "(?:0x)?[0-9a-fA-F]{2}"
_HEX = re.compile(rf"(?<![0-9a-zA-Z])(?:{_PAIR}[ :,]{{0,2}}){{{LEAST_CODE // 2},}}")
_BINARY = re.compile(r"(?<![0-9])(?:[01]{8}[ ,]{0,2}){3,}(?![0-9])")
_URL_SAFE = str.maketrans("-_", "+/")
_NO_DIGIT = re.compile(r"0x|\\x|[^0-9a-fA-F]")
_LOOK = 64
_LEAST_READ = 4


def _decoded(text: str) -> str:
    """Codes of readable text as that text; pictures, keys and digests are none."""
    text = _in_place(text, _BASE64, _from_base64)
    text = _in_place(text, _HEX, _from_hex)
    return _in_place(text, _BINARY, _from_binary)


def _in_place(text: str, pattern: re.Pattern[str], decode: Callable[[str], str | None]) -> str:
    """``text`` with the runs that can be decoded; the ends of lines between two of them are those of the code."""
    pieces, at = [], 0
    for run in pattern.finditer(text):
        said = decode(run.group())
        if said is None:
            continue
        between = text[at : run.start()]
        wrapped = at > 0 and between in ("\n", "\r\n")
        pieces += ["" if wrapped else between, said, " " if run.group()[-1].isspace() else ""]
        at = run.end()
    return "".join([*pieces, text[at:]])


def _from_base64(run: str) -> str | None:
    """A stretch of base64, wherever a window has cut it: one of four beginnings is the right one."""
    code = run.rstrip("=").translate(_URL_SAFE)
    for begin in range(4):
        whole = code[begin : begin + (len(code) - begin) // 4 * 4]
        if len(whole) >= LEAST_CODE - 4 and _readable(binascii.a2b_base64(whole[:_LOOK])) is not None:
            rest = code[begin + len(whole) :]
            padded = whole + (rest + "=" * (4 - len(rest)) if len(rest) > 1 else "")
            return _readable(binascii.a2b_base64(padded))
    return None


def _from_hex(run: str) -> str | None:
    digits = _NO_DIGIT.sub("", run)
    for begin in (0, 1):
        said = _readable(bytes.fromhex(digits[begin : begin + (len(digits) - begin) // 2 * 2]))
        if said is not None:
            return said
    return None


def _from_binary(run: str) -> str | None:
    digits = re.sub("[^01]", "", run)
    return _readable(bytes(int(digits[at : at + 8], 2) for at in range(0, len(digits), 8)))


def _readable(code: bytes) -> str | None:
    """Bytes as the text that they plainly are, if they are; a character that is cut at an end is left out."""
    said = _utf8(code)
    if not said or len(said) < _LEAST_READ or not (said.isascii() or len(code) >= 3 * _LEAST_READ):
        return None
    letters = sum(map(str.isalpha, said))
    words = letters + sum(map(str.isdecimal, said)) + said.count(" ")
    printable = all(character.isprintable() or character in "\t\r\n" for character in said)
    return said if printable and letters >= 0.3 * len(said) and words >= 0.6 * len(said) else None


def _utf8(code: bytes) -> str:
    """UTF-8 without what is left of a character at either end; empty if it is none."""
    begin = next((at for at in range(min(3, len(code))) if code[at] & 0xC0 != 0x80), 3)
    try:
        return code[begin:].decode()
    except UnicodeDecodeError as error:
        cut = error.reason == "unexpected end of data"
        return code[begin : begin + error.start].decode() if cut else ""


# Letters spelled apart

_APART = re.compile(rf"(?<!\S)\S(?:[ \t]{{1,6}}\S(?!\S)){{{_LEAST_LETTERS - 1},}}(?!\S)")
_GAP = re.compile(r"[ \t]+")
_SPACES = dict.fromkeys([0xA0, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x2800, 0x3000], " ")
_DOTTED = re.compile(r"(?<![^\W_])([^\W\d_])([-._*·~|/+,\n])(?:[^\W\d_]\2){2,}[^\W\d_](?![^\W_])")
_SHORT_DOTTED = re.compile(r"(?<![^\W_])[^\W\d_](?:[-._*·~|/+][^\W\d_]){1,2}(?![^\W_])")


def _joined(text: str) -> str:
    spaced = text if text.isascii() else text.translate(_SPACES)
    closed = _APART.sub(lambda run: _closed_up(run.group()), spaced)
    text = text if closed == spaced else closed
    joined = _DOTTED.sub(lambda run: _without_separator(run.group()), text)
    # Short words are spelled apart where long ones are, and are abbreviations elsewhere.
    return joined if joined == text else _SHORT_DOTTED.sub(lambda run: _without_separator(run.group()), joined)


def _closed_up(run: str) -> str:
    """The letters of a run without the gaps between them; wider gaps are those between words."""
    marks = run.split()
    letters = sum(mark.isalnum() for mark in marks)
    if letters < max(_LEAST_LETTERS, 0.75 * len(marks)) or not any(map(str.isalpha, marks)):
        return run
    gaps = [len(gap) for gap in _GAP.findall(run)]
    narrow = min(gaps)
    if 2 * gaps.count(narrow) < len(gaps):
        return run  # columns of a table
    return _GAP.sub(lambda gap: "" if len(gap.group()) == narrow else " ", run)


def _without_separator(run: str) -> str:
    return run if run[1] == "." and run.isupper() else run[::2]  # U.S.S.R.


# What takes some words to tell: of the whole text, or of one sentence among others

_SENTENCE = re.compile(r"(?:[^\n.!?]|[.!?](?!\s))+")


def _by_sentences(text: str, undo: Callable[[str], str]) -> str:
    whole = undo(text)
    return whole if whole != text else _SENTENCE.sub(lambda sentence: undo(sentence.group()), text)


# Leetspeak

_LEET = str.maketrans("013456789@$!", "oieasgtbgasi")
_WITHIN_LETTERS = re.compile(r"[A-Za-z][013457@$]+[A-Za-z]")
# A code that nothing was read from is no place to look for words.
_LEET_WORD = re.compile(
    r"[A-Za-z0-9+/_=-]{40,}|(?<![\w@$])([013457@$]?[A-Za-z]+(?:[013457@$]{1,2}[A-Za-z]+)+[013457]?)(?![\w@$]|\.\w)"
)
_TOKEN = re.compile(r"[\w@$]+(?:![\w@$]+)*")
_MIXED = re.compile(r"(?!\d+[A-Za-z]{1,2}\Z)(?=.*[A-Za-z])(?=.*[013457@$])[A-Za-z013456789@$!]+\Z")  # 4th, 10k are not
_LEET_TOKEN = re.compile(r"[A-Za-z013456789@$!]+\Z")
_HEX_DIGITS = re.compile(r"[0-9a-f]+\Z|[0-9A-F]+\Z")
_TWO_LETTERS = re.compile(r"[A-Za-z]{2}")
_LEET_CHARACTER = re.compile(r"[013457@$]")
_OFTEN_IN_NAMES = frozenset("357$")
_DENSE = 0.15
_LEAST_DENSE = 2
_LONGEST_BEFORE_AT = 2


def _unleeted(text: str) -> str:
    """Words with digits for letters; in a sentence full of them, whatever can be read so."""
    if not _WITHIN_LETTERS.search(text):
        return text
    text = _by_sentences(text, _unleeted_sentence)
    return _LEET_WORD.sub(lambda word: _read_leet(word[1]) if _is_leet(word[1]) else word.group(), text)


def _unleeted_sentence(sentence: str) -> str:
    if not any(_is_leet(word) for word in _LEET_WORD.findall(sentence)):
        return sentence
    tokens = _TOKEN.findall(sentence)
    if sum(bool(_MIXED.match(token)) for token in tokens) < max(_LEAST_DENSE, _DENSE * len(tokens)):
        return sentence
    return _TOKEN.sub(lambda token: _read_leet(token.group()), sentence)


def _is_leet(word: str | None) -> bool:
    """Whether a word is no name, as are ``x0y0``, ``a1e0``, ``W3Schools``, ``CH3OH`` and ``me@host``."""
    if not word or len(word) < _LEAST_LETTERS or _HEX_DIGITS.match(word) or not _TWO_LETTERS.search(word):
        return False
    letters = _LEET_CHARACTER.sub("", word)
    written = letters.islower() or letters.istitle() or (letters.isupper() and not _OFTEN_IN_NAMES & set(word))
    return written and word.find("@") <= _LONGEST_BEFORE_AT


def _read_leet(token: str) -> str:
    number = token.isdigit() and len(token) > _LEAST_LETTERS - 1
    return token if number or not _LEET_TOKEN.match(token) else token.replace("11", "ll").translate(_LEET)


# Rot13 and words written backwards

_WORDS = "the and to of is that it for you with are this have from not your will into can when then a in"
_FUNCTION_WORDS = frozenset(_WORDS.split())
_ROT13 = str.maketrans(
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz", "NOPQRSTUVWXYZABCDEFGHIJKLMnopqrstuvwxyzabcdefghijklm"
)
_ROTATED = frozenset(word.translate(_ROT13) for word in _FUNCTION_WORDS if len(word) > 1)
_BACKWARDS = frozenset(word[::-1] for word in _FUNCTION_WORDS if len(word) > 1) - {"ton", "si", "era", "ni"}
_LETTERS = re.compile(r"[A-Za-z]+")
_HINTS = ("gur ", "naq ", "gung ", "jvgu ", "lbh", "eht", " dna ", "taht ", "htiw ", "uoy")
_LEAST_HITS = 3
_SHARE_OF_HITS = 0.15


def _turned(text: str) -> str:
    lowered = text.lower()
    if not any(hint in lowered for hint in _HINTS):
        return text
    return _by_sentences(text, _turned_sentence)


def _turned_sentence(sentence: str) -> str:
    """A sentence whose function words are English only once it is turned; what is English already is left alone."""
    words = [word.lower() for word in _LETTERS.findall(sentence)]
    enough = max(_LEAST_HITS, _SHARE_OF_HITS * len(words), 1 + _among(words, _FUNCTION_WORDS))
    if _among(words, _ROTATED) >= enough:
        return sentence.translate(_ROT13)
    return sentence[::-1] if _among(words, _BACKWARDS) >= enough else sentence


def _among(words: list[str], known: frozenset[str]) -> int:
    return sum(word in known for word in words)


_UNDOING: tuple[Callable[[str], str], ...] = (
    _without_invisible,
    _without_markup,
    _without_marks,
    _in_latin,
    _unescaped,
    _decoded,
    _joined,
    _unleeted,
    _turned,
)
