"""Which of several good answers says most about the question? A measure that costs no model."""

from __future__ import annotations

import re
from functools import cache

from tta_middleware.guard.refusal_opening import is_refusal

_WORD = re.compile(r"[^\W\d_]{4,}")
# Endings differ between a question and its answer; beginnings of words seldom do.
_STEM = 5
_COMMON = """
about after also because been before could from give have here into just make more most much only other please should
show some such tell than that their them then there these they this those very want what when where which while with
without would write your
"""


def helpfulness(question: str, answer: str) -> tuple[bool, float]:
    """How much an answer helps, to be compared with others to the same question; greater is better.

    Refusals stand below all others. Then counts which share of the question's words the answer takes up, by their
    first letters.
    """
    asked, said = _stems(question), _stems(answer)
    return not is_refusal(answer), len(asked & said) / len(asked) if asked else 0.0


def _stems(text: str) -> set[str]:
    return {word[:_STEM] for word in _WORD.findall(text.lower()) if word not in _empty()}


@cache
def _empty() -> frozenset[str]:
    return frozenset(_COMMON.split())
