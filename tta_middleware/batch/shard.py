"""What a batch is asked for besides how answers are made."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from tta_middleware.errors import ConfigurationError

STDIO = "-"
"""Stands for stdin as input and for stdout as output."""


class Order(StrEnum):
    """In which order the output comes."""

    INPUT = "input"
    COMPLETED = "completed"


@dataclass(frozen=True, slots=True)
class Shard:
    """The lines ``index``, ``index + count``, ... of the input, both from 1."""

    index: int = 1
    count: int = 1

    def holds(self, line: int) -> bool:
        """Whether the line of that number, from 1, is one of this shard's."""
        return line % self.count == self.index % self.count


def parse_shard(text: str) -> Shard:
    """``2/4`` is the second of four.

    Raises:
        ConfigurationError: it is not of that form.
    """
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text.strip())
    index, count = map(int, found.groups()) if found else (0, 0)
    if not 1 <= index <= count:
        raise ConfigurationError(f"--shard takes i/n with i from 1 to n, such as 2/4, not {text!r}")
    return Shard(index, count)
