"""Exit codes, and one clear line for every error.

0    done; for ``chat``: answered, clean or neutralised
1    something failed: the model, the moderator, a missing package, a closed output pipe
2    bad usage or bad input
3    blocked: no safe and usable answer was found
130  interrupted
"""

from __future__ import annotations

import json
import sys
from typing import Any

from tta_middleware.errors import ConfigurationError, DataError, TTAError, UnsafeAnswerError

OK, FAILED, USAGE, BLOCKED, INTERRUPTED = 0, 1, 2, 3, 130


def exit_code(error: BaseException) -> int:
    """The exit code that tells of ``error``."""
    if _of_parser(error) or isinstance(error, ConfigurationError | DataError):
        return USAGE
    return BLOCKED if isinstance(error, UnsafeAnswerError) else FAILED


def describe(error: BaseException) -> tuple[str, str]:
    """An error's type and its message on one line.

    Errors that this package did not raise are named by their type alone, since their text may hold a prompt or a key.
    """
    if _of_parser(error):
        return "UsageError", _usage(error)
    kind = type(error).__name__
    if isinstance(error, TTAError):
        # Messages speak of the Python argument; here the same thing is an option.
        return kind, " ".join(str(error).replace("pass allow_download=True", "add --allow-download").split())
    if isinstance(error, OSError) and error.strerror:
        return kind, f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return kind, f"unexpected {kind}; run again with --debug for the traceback"


def unwrapped(error: BaseException) -> BaseException:
    """The only error of a group, or the error itself."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def show(error: BaseException, *, as_json: bool) -> None:
    """Print the error: as an object on stdout for machines, else as one line on stderr."""
    kind, message = describe(error)
    if as_json:
        print(json.dumps({"error": {"type": kind, "message": message}}))  # noqa: T201
    else:
        print(f"tta: {message}", file=sys.stderr)  # noqa: T201


def _of_parser(error: BaseException) -> bool:
    """Whether the command line's parser raised it: a ClickException, of which Typer may bring a copy of its own."""
    return callable(getattr(error, "format_message", None))


def _usage(error: Any) -> str:
    message = " ".join(error.format_message().split())
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "tta"
    end = "" if message.endswith(("?", ".")) else "."
    return f"{message}{end} See: {command} --help"
