"""Import paths of 0.1 that the documentation named, for one release.

``tta_middleware/__init__.py`` adds this folder to its ``__path__``, so ``tta_middleware.events`` is found here; it
warns and is from then on the very module of the new place. Nothing of the package itself imports from here.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from types import ModuleType


def stand_for(old: str, new: str) -> ModuleType:
    """Warn that ``old`` moved, and let the module ``new`` be imported under both names."""
    warn(old, new)
    sys.modules[old] = import_module(new)
    return sys.modules[old]


def warn(old: str, new: str) -> None:
    """Tell who imports: the frames between are this one, the function that calls it, and the old module."""
    warnings.warn(f"{old} is {new} now; the old path goes with the next release", DeprecationWarning, stacklevel=4)
