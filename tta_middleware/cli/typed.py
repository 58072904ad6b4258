"""Policies and texts from what was typed."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tta_middleware.errors import ConfigurationError
from tta_middleware.policy import Policy


def policy_of(text: str | None, threshold: float | None) -> Policy:
    """A policy from ``--policy`` and ``--threshold``, which wins.

    Raises:
        ConfigurationError: no JSON object, an unknown field or category, or a threshold outside [0, 1].
    """
    fields = _policy_fields(text) if text else {}
    return Policy(**fields | ({} if threshold is None else {"threshold": threshold}))


def _policy_fields(text: str) -> dict[str, Any]:
    inline = text.lstrip().startswith("{")
    where = "--policy" if inline else text
    try:
        fields = json.loads(text if inline else Path(text).read_text(encoding="utf-8"))
    except OSError as error:
        hint = f"; a threshold is --threshold {text}" if _is_number(text) else ""
        raise ConfigurationError(f"--policy: cannot read {text}: {error.strerror}{hint}") from None
    except ValueError:
        named = Path(text).suffix in (".toml", ".yaml", ".yml")
        hint = "; files of named policies are for tta serve --policies" if named else ""
        raise ConfigurationError(f"{where} is not valid JSON{hint}") from None
    if not isinstance(fields, dict):
        raise ConfigurationError(f"{where} must hold a JSON object with threshold, categories, on_error or notice")
    return fields


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def engine_options(given: Sequence[str] | None) -> dict[str, Any]:
    """Settings from ``NAME=VALUE``, where a value that is JSON stands for what it says: ``true``, ``8``, an object.

    Raises:
        ConfigurationError: no name, or no value.
    """
    found: dict[str, Any] = {}
    for text in given or []:
        name, equals, value = text.partition("=")
        if not (name.strip() and equals and value.strip()):
            raise ConfigurationError(f"--engine-option is NAME=VALUE, path=plain, say; not {text!r}")
        try:
            found[name.strip().replace("-", "_")] = json.loads(value)
        except ValueError:
            found[name.strip().replace("-", "_")] = value.strip()
    return found


def arguments_of(text: str | None) -> dict[str, Any]:
    """Arguments of a chat template from ``--chat-template-kwargs``.

    Raises:
        ConfigurationError: no JSON object.
    """
    try:
        fields = json.loads(text or "{}")
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise ConfigurationError('--chat-template-kwargs is a JSON object, such as {"reasoning_effort": "low"}')
    return fields


def text_or_stdin(text: str | None) -> str:
    """The argument, or all of stdin without one or with ``-``.

    Raises:
        ConfigurationError: nothing was given, it is empty, or it is not UTF-8.
    """
    if text is None and sys.stdin.isatty():
        raise ConfigurationError("no text; give it as an argument or pipe it in")
    try:
        text = sys.stdin.buffer.read().decode() if text in (None, "-") else text.encode().decode()
    except UnicodeError:
        raise ConfigurationError("the text is not UTF-8") from None
    if not text.strip():
        raise ConfigurationError("the text is empty; give it as an argument or pipe it in")
    return text
