"""A search method with settings of one's own, read from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from tta_middleware.config import Settings
from tta_middleware.errors import ConfigurationError
from tta_middleware.evaluation.comparators.guarded import Guarded
from tta_middleware.methods.base import Method
from tta_middleware.registry import METHODS, check_known


def variant(text: str) -> Guarded:
    """The comparator that ``NAME=FILE.json`` describes.

    The file holds one object: ``method``, the name of a search method, and those of its settings that differ from what
    it has by itself, as ``{"method": "race", "wave": 2}``.

    Raises:
        ConfigurationError: it is not of that form, the file cannot be read, or the method has no such setting.
    """
    name, _, file = text.partition("=")
    if not (name.strip() and file) or "," in name:
        raise ConfigurationError(f"--variant takes NAME=FILE.json, the name without commas, not {text!r}")
    settings = _read(Path(file))
    method = settings.pop("method", None)
    if not isinstance(method, str):
        raise ConfigurationError(f"{file} does not say which method it changes; add for example 'method': 'race'")
    made = check_known(METHODS, "method", method).load()
    if not (isinstance(made, type) and issubclass(made, Settings)):
        raise ConfigurationError(f"{file}: the method {method!r} takes no settings from a file")
    return Guarded(name.strip(), cast(Method, made(**settings)))


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot read the variant in {file}: {error}") from None
    if not isinstance(found, dict):
        raise ConfigurationError(f"{file} holds no JSON object")
    return found
