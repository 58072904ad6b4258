"""The one place where torch and transformers are imported.

Both are heavy and optional, so nothing imports them before a model is loaded.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tta_middleware.errors import MissingExtraError

if TYPE_CHECKING:
    from types import ModuleType

INSTALL_LOCAL = 'pip install "tta-middleware[local]"'

_lock = threading.Lock()


def import_torch() -> ModuleType:
    """torch, with passive OpenMP waiting where this import is the first.

    OpenMP threads that spin stall small matrix products to 8 ms each when another process wants the core, and
    OpenMP reads its settings only when its library loads. So ``OMP_WAIT_POLICY=PASSIVE`` is in the environment
    for just this import, and only if neither torch nor the user has been there before.

    Raises:
        MissingExtraError: torch is not installed.
    """
    with _lock:
        ours = "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ
        if ours:
            os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        try:
            import torch
        except ImportError as exc:
            raise _missing("torch") from exc
        finally:
            if ours:
                del os.environ["OMP_WAIT_POLICY"]
    return torch


def import_transformers() -> Any:
    """transformers, imported after torch.

    Raises:
        MissingExtraError: transformers or torch is not installed.
    """
    import_torch()
    try:
        import transformers
    except ImportError as exc:
        raise _missing("transformers") from exc
    return transformers


def _missing(name: str) -> MissingExtraError:
    return MissingExtraError(f"local models need {name}, which is not installed; run: {INSTALL_LOCAL}")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own progress bars off the terminal."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
