"""When text that left is covered by what was scored: pure functions of texts, verdicts and policies.

They are written anew, on purpose: what they judge decides the same things in other words, and neither may take the
other's word for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tta_middleware.policy import Policy
from tta_middleware.types import Verdict

_OPAQUE = frozenset({"base64", "data", "encrypted_content", "id", "index", "signature", "thoughtSignature", "type"})
"""Keys of content blocks whose values no reader reads, unless they hold words: more than one piece of ASCII."""

_ARGUMENTS = frozenset({"args", "arguments", "input", "output", "partial_json"})
"""Keys of what a tool is given or gives back; in there every key is a tool's own, so no value is opaque."""

_SEGMENT = 12
"""Text that was put together from pieces is covered piece by piece; shorter pieces would prove nothing."""


def passes(verdict: Verdict, policy: Policy) -> bool:
    """Whether a text may leave: every enforced category is below its threshold, or the policy only observes.

    Margins and holding are left aside.
    """
    return policy.mode == "observe" or below(verdict, policy)


def below(verdict: Verdict, policy: Policy) -> bool:
    """Whether every enforced category is below its threshold, whatever the policy does about it."""
    threshold = 1.0 if policy.threshold is None else policy.threshold
    return all(
        score < policy.categories.get(category, threshold)
        for category, score in verdict.scores.items()
        if category not in policy.shadow
    )


def covered_until(answer: str, begin: int, scored: Sequence[str], context: int) -> int:
    """How far ``answer`` is covered from ``begin`` on.

    A character is covered by a text that holds it and the ``context`` characters before it, as far as there are any,
    just as they stand in the answer. Different texts may cover neighbouring characters.
    """
    at = begin
    while at < len(answer):
        reached = max((_reach(answer, at, text, context) for text in reversed(scored)), default=at)
        if reached == at:
            return at
        at = reached
    return at


def _reach(answer: str, at: int, text: str, context: int) -> int:
    """Where the best match of ``answer`` around ``at`` ends in ``text``; ``at`` if there is none."""
    begin = max(0, at - context)
    needle, best = answer[begin : at + 1], at
    found = text.find(needle)
    while found >= 0:
        best = max(best, begin + _common(answer, begin, text, found))
        if best == len(answer):
            break
        found = text.find(needle, found + 1)
    return best


def _common(one: str, begin: int, other: str, start: int) -> int:
    """Length of what ``one`` from ``begin`` and ``other`` from ``start`` have in common."""
    low, high = 0, min(len(one) - begin, len(other) - start)
    while low < high:
        middle = (low + high + 1) // 2
        if one[begin : begin + middle] == other[start : start + middle]:
            low = middle
        else:
            high = middle - 1
    return low


def covered_whole(text: str, scored: Sequence[str], limit: int | None = None, overlap: int = 0) -> bool:
    """Whether one text holds all of ``text``; beyond ``limit`` characters, several that overlap."""
    if not text.strip() or any(text in one for one in scored):
        return True
    return limit is not None and len(text) > limit and covered_until(text, 0, scored, overlap) == len(text)


def covered_loosely(text: str, scored: Sequence[str]) -> bool:
    """Whether ``text`` is made of parts of what was scored: for what a surface puts together from checked pieces."""
    at = 0
    while at < len(text):
        if text[at].isspace():
            at += 1
            continue
        reached = max((_reach(text, at, one, 0) for one in scored), default=at)
        if reached < len(text) and reached - at < _SEGMENT:
            return False
        at = reached
    return True


def readable(value: Any, *, arguments: bool = False) -> Iterator[str]:
    """The strings that a reader of a content block, an additional argument or a tool's ``arguments`` could read.

    Strings that hold JSON are given decoded, to any depth.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            if arguments or key not in _OPAQUE or _holds_words(item):
                yield from readable(item, arguments=arguments or key in _ARGUMENTS)
    elif isinstance(value, str):
        inner = _decoded(value)
        if inner is not None:
            yield from readable(inner, arguments=arguments)
        elif arguments or not _is_file(value):
            yield value
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        for item in value:
            yield from readable(item, arguments=arguments)


def _holds_words(value: Any) -> bool:
    """Whether a value is more than base64, a signature or an id, which are ASCII in one piece."""
    if isinstance(value, str):
        return not value.isascii() or any(sign.isspace() for sign in value.strip())
    return isinstance(value, Mapping | list)


def _is_file(text: str) -> bool:
    """Whether a string is a file, written as a data URL."""
    return text.startswith("data:") and ";base64," in text[:200] and not _holds_words(text)


def call_covered(name: str, arguments: Any, scored: Sequence[str]) -> bool:
    """Whether one text says all that a tool call says once decoded: its name, every key and every string.

    A name that is empty is the user's own. Where nothing hides behind an escape, the call as it was written says it.
    """
    words = [name, *said(arguments)]
    return any(all(word in one for word in words) for one in scored)


def said(arguments: Any) -> Iterator[str]:
    """Every key and every string of a call's arguments, decoded to any depth."""
    if isinstance(arguments, Mapping):
        for key, item in arguments.items():
            yield str(key)
            yield from said(item)
    elif isinstance(arguments, str):
        inner = _decoded(arguments)
        yield from (arguments,) if inner is None else said(inner)
    elif isinstance(arguments, Sequence) and not isinstance(arguments, bytes):
        for item in arguments:
            yield from said(item)


def _decoded(text: str) -> Any:
    """The list, mapping or string that a string holds as JSON."""
    if not text.lstrip().startswith(("{", "[", '"')):
        return None
    try:
        inner = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None
    return inner if inner != text else None
