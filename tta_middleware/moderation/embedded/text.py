"""Text as the embedded models read it: folded characters, undone disguises, words.

Pure functions of a string; the same text gives the same words on every machine and in every run.
"""

from __future__ import annotations

import re
import unicodedata

_INVISIBLE = dict.fromkeys((0x00AD, 0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF))
_LOOKALIKES = str.maketrans("аеорсухіјѕԁԛαοιν", "aeopcyxijsdqaoiv")  # noqa: RUF001 - the disguises themselves
_FOLDS = str.maketrans({"‘": "'", "’": "'", "ʼ": "'", "_": " "})  # noqa: RUF001
_LEET = str.maketrans("013457@$!", "oieastasi")

_WORD = re.compile(r"[@$]?[^\W_]+(?:['@$!][^\W_]+|[@$]+)*")
_DISGUISED = re.compile(r"[a-z]+[013457@$!]+[a-z][a-z013457@$!]*|[a-z]+[@$]+|[@$][a-z]{2,}")
_MIXED_SCRIPT = re.compile(r"(?=.*[a-z])(?=.*[\u0370-\u052f])")
_SPELLED = re.compile(r"\b(?:\w[ .\-*]){3,}\w\b")
_SEPARATORS = re.compile(r"[ .\-*]")


def normalise(text: str) -> str:
    """Compatibility-folded lower case, without invisible characters, spelled-out words joined (b-o-m-b)."""
    folded = text if text.isascii() else unicodedata.normalize("NFKC", text).translate(_INVISIBLE)
    return _SPELLED.sub(_join, folded.lower().translate(_FOLDS))


def words(text: str) -> list[str]:
    """The words of a text in order; digits-only words count as ``0``, leetspeak is read as letters."""
    return [_plain(word) for word in _WORD.findall(normalise(text))]


def _join(match: re.Match[str]) -> str:
    letters = _SEPARATORS.sub("", match.group())
    # A row of digits ("1 2 3 4") is a list, not a disguised word.
    return letters if letters.isalpha() else match.group()


def _plain(word: str) -> str:
    if word.isalpha() and word.isascii():
        return word
    if word.isdigit():
        return "0"
    if not word.isascii() and _MIXED_SCRIPT.match(word):
        word = word.translate(_LOOKALIKES)
    return word.translate(_LEET) if _DISGUISED.fullmatch(word) else word
