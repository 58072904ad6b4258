"""What a report shows of paths: reports are passed on, and a path tells of the machine that they were made on."""

from __future__ import annotations

import shlex
from pathlib import PurePath


def shown_path(word: str) -> str:
    """``word`` as it is, or an absolute path's last part, also behind a kind as in ``guard:PATH``."""
    kind, colon, rest = word.partition(":")
    if colon and PurePath(rest).is_absolute():
        return f"{kind}:{PurePath(rest).name}"
    path = PurePath(word)
    return path.name if path.is_absolute() and path.name else word


def shown_command(command: str) -> str:
    """A command line in which absolute paths are their last part, also behind ``--option=`` and ``NAME=``; the rest as
    typed."""
    try:
        words = shlex.split(command)
    except ValueError:
        return command
    return shlex.join(_shown_word(word) for word in words)


def _shown_word(word: str) -> str:
    name, sign, value = word.partition("=")
    return f"{shown_path(name)}={_shown_word(value)}" if sign else shown_path(word)
