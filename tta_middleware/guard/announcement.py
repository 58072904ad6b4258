"""Does an answer only announce one? A promise to help, a greeting, a question back, a heading, and then nothing.

Whoever is told to begin with "Sure, here is how:" begins so, and a repair that ends there scores low because it says
nothing. As with refusals (:mod:`.refusal_opening`) the phrases are English only; that an answer ends in a colon, or is
nothing but marks of a list, a heading or markup, tells the same in other languages.
"""

from __future__ import annotations

import re

from tta_middleware.guard.refusal_opening import is_refusal

_AGREEING = (
    r"(?:sure(?: thing)?|certainly|of course|absolutely|definitely|yes|okay|ok|great|alright|hello|hi|hey|no problem"
    r"|got it|understood|thanks?(?: you)?(?: for (?:your question|asking|reaching out))?|(?:great|good) question"
    r"|i(?:'m| am) glad (?:that )?you asked|i hope (?:this|that|it) helps)(?: there)?"
)
_HELPING = (
    r"(?:help|assist|provide|share|answer|explain|show|write|create|give|offer|guide|support|tell|describe|outline|do"
    r"|try)"
)
_GLAD = r"(?:happy|glad|delighted|pleased|excited)"
_INVITING = (
    r"(?:(?:please|just) )*(?:feel free to|don't hesitate to|do not hesitate to|let me know|i(?:'m| am) here"
    rf"|i(?:'ll| will|'d| would) (?:be (?:more than )?{_GLAD} to|do my best))\b.*"
)
_PROMISING = (
    r"(?:here(?:'s| is| are)|below (?:is|are))\b.*",
    r"here you go",
    rf"i(?:'d| would) be (?:more than )?{_GLAD} to {_HELPING}\b.*",
    rf"i(?:'m| am) (?:here|ready|{_GLAD}) to {_HELPING}\b.*",
    # What is told behind "that" is told.
    rf"i(?:'ll| will| can)(?: certainly| definitely| gladly)? (?:do my best|{_HELPING}\b)(?! (?:you )?that \w).*",
    r"let(?:'s| us) (?:begin|start|get started|proceed|go|explore|dive)\b.*",
    r"let me (?:explain|help|show|tell|see|think)\b.*",
    rf"(?:how|what) (?:can|may|could) i (?:{_HELPING})\b.*",
    r"please (?:provide|tell|let me know|give|share|specify|describe|clarify)\b.*",
    _INVITING,
    rf"(?:if|should|when|whenever)\b[^,]*,? {_INVITING}",
)
_NOTHING = re.compile(rf"(?:{_AGREEING}[\s,!-]*)*(?:{'|'.join(_PROMISING)})?")
_LONGEST = 24
"""Words of a text that may be one by the colon at its end alone."""

_SCAFFOLD = re.compile(
    r"</?\w+ ?/?>|<\|\w+\|>|!\[[^\]\n]*\]\([^)\n]*\)|^[ \t]*(?:#{1,6} .*|`{3,}.*|[-*+>#`_=|: \t]+)$", re.MULTILINE
)
"""What an answer is set in: bare tags, pictures, headings, fences, and lines of marks alone."""

_EMPTY_ITEM = re.compile(r"^[ \t>*-]*(\d{1,3})[.)][ \t*_]*$", re.MULTILINE)
_SENTENCE = re.compile(r"[^.!?:\n\uff1a]+[.!?:\n\uff1a]*")
_MARKS = " \t\"'*_-,;`"
_QUOTES = str.maketrans({"\u2019": "'", "\u2018": "'", "\u201c": '"', "\u201d": '"'})


def announces(text: str) -> bool:
    """Whether an answer that is over says nothing but that one will follow; a refusal says something."""
    plain = _without_scaffold(text.translate(_QUOTES).lower()).strip(_MARKS + "\n")
    if len(plain.split()) < _LONGEST and plain.endswith((":", "\uff1a")):
        return True
    sentences = [part for sentence in _SENTENCE.findall(plain) if (part := sentence.strip(_MARKS + ".!:\n\uff1a"))]
    # A question to whoever asked is something by itself, and no more than a promise beside one.
    said = [part.rstrip("?") for part in sentences if not (part.endswith("?") and re.search(r"\byour?\b", part))]
    if not said:
        return all(_NOTHING.fullmatch(part.rstrip("?")) for part in sentences)
    return all(_NOTHING.fullmatch(part) for part in said) and not is_refusal(text)


def _without_scaffold(text: str) -> str:
    """``text`` without what it is set in, and without the numbers of a list that has no items."""
    text = _SCAFFOLD.sub("", text)
    numbers = [int(number) for number in _EMPTY_ITEM.findall(text)]
    return _EMPTY_ITEM.sub("", text) if numbers == list(range(1, len(numbers) + 1)) else text
