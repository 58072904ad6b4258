"""How the records of a batch ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from tta_middleware.batch.exit_codes import FAILED, OK, USAGE

if TYPE_CHECKING:
    from tta_middleware.batch.input import Item
    from tta_middleware.batch.target import Done

_ENDS = ("failed", "broken", "skipped")


class Tally(Counter[str]):
    """Records by outcome, and always how many ``failed``, were ``broken`` and were ``skipped``.

    ``skipped_failed`` and ``skipped_broken`` are those of the skipped ones that an earlier run left as errors.
    """

    def __init__(self) -> None:
        super().__init__(failed=0, broken=0, skipped=0, skipped_failed=0, skipped_broken=0)

    def skip(self, item: Item, done: Done) -> None:
        self["skipped"] += 1
        self["skipped_failed"] += item.key in done.failed
        self["skipped_broken"] += item.key in done.broken

    def __str__(self) -> str:
        return told(self)


def told(counts: Mapping[str, int]) -> str:
    """The counts of a tally in words."""
    names = [*(name for name in counts if name not in _ENDS and not name.startswith("skipped_")), *_ENDS]
    words = [f"{counts[name]} {name}" for name in names if counts[name]]
    if left := counts["skipped_failed"] + counts["skipped_broken"]:
        words.append(f"{left} of them errors of an earlier run, which --retry-errors tries again")
    return ", ".join(words) or "nothing to do"


def exit_code_of(counts: Mapping[str, int]) -> int:
    """That of one run over all of the input, however often it was cut off: errors of earlier runs count."""
    if counts["broken"] or counts["skipped_broken"]:
        return USAGE
    return FAILED if counts["failed"] or counts["skipped_failed"] else OK
