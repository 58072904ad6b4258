"""Does an answer only announce one? A promise to help, a greeting, a question back, and then nothing.

Whoever is told to begin with "Sure, here is how:" begins so, and a repair that ends there scores low because it says
nothing. As with refusals (:mod:`.refusal_opening`) the phrases are English only; that an answer ends in a colon tells
the same in other languages.
"""

from __future__ import annotations

import re

from tta_middleware.guard.refusal_opening import is_refusal

_AGREEING = (
    r"(?:sure(?: thing)?|certainly|of course|absolutely|definitely|okay|ok|great|alright|hello|hi|hey|no problem|got it"
    r"|understood|thanks?(?: you)?)(?: there)?"
)
_HELPING = (
    r"(?:help|assist|provide|share|answer|explain|show|write|create|give|offer|guide|support|tell|describe|outline|do"
    r"|try)"
)
_PROMISING = (
    r"here(?:'s| is| are)\b.*",
    r"here you go",
    rf"i(?:'d| would) be (?:more than )?(?:happy|glad|delighted|pleased) to {_HELPING}\b.*",
    rf"i(?:'m| am) (?:here|happy|glad|ready) to {_HELPING}\b.*",
    rf"i(?:'ll| will| can)(?: certainly| definitely| gladly)? (?:do my best|{_HELPING}\b).*",
    r"let(?:'s| us) (?:begin|start|get started|proceed|go|explore|dive)\b.*",
    rf"(?:how|what) (?:can|may|could) i (?:{_HELPING})\b.*",
    r"please (?:provide|tell|let me know|give|share|specify|describe)\b.*",
)
_NOTHING = re.compile(rf"(?:{_AGREEING}[\s,!-]*)*(?:{'|'.join(_PROMISING)})?")
_LONGEST = 24
"""Words of a text that may be one by the colon at its end alone."""

_SENTENCE_END = re.compile(r"[.!?:\n\uff1a]+")
_MARKS = " \t\"'*_-,;`"
_QUOTES = str.maketrans({"\u2019": "'", "\u2018": "'", "\u201c": '"', "\u201d": '"'})


def announces(text: str) -> bool:
    """Whether an answer that is over says nothing but that one will follow; a refusal says something."""
    plain = text.translate(_QUOTES).lower()
    if len(plain.split()) < _LONGEST and plain.rstrip(_MARKS + "\n").endswith((":", "\uff1a")):
        return True
    sentences = [part for sentence in _SENTENCE_END.split(plain) if (part := sentence.strip(_MARKS))]
    return bool(sentences) and all(_NOTHING.fullmatch(part) for part in sentences) and not is_refusal(text)
