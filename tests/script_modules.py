"""Scripts outside the package, as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

PROJECT = Path(__file__).parents[1]


def script_module(path: str, name: str | None = None) -> ModuleType:
    """The script at a path of the project; known by ``name``, or else its own, to whatever looks its classes up."""
    spec = importlib.util.spec_from_file_location(name or Path(path).stem, PROJECT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
