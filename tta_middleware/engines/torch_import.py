"""The one place where torch and transformers are imported.

Both are heavy and optional, so nothing imports them before a model is loaded.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from tta_middleware.aio import process as _process
from tta_middleware.errors import MissingExtraError

if TYPE_CHECKING:
    from types import ModuleType

T = TypeVar("T")

INSTALL_LOCAL = 'pip install "tta-middleware[local]"'

_lock = _process.Lock()

# The second is how often GNU's library looks before a thread sleeps, which overrules the first where it is known.
_WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}


def import_torch() -> ModuleType:
    """torch, with OpenMP threads that wait briefly for each other where this import is the first.

    Threads that spin for long stall small matrix products to 8 ms each when another process wants the core; those that
    sleep at once double the time of a decode step on idle cores (docs/decisions/008). OpenMP reads its settings only
    when its library loads, so they are in the environment for just this import, and only if torch has not been
    imported before and the user has asked for nothing else.

    Raises:
        MissingExtraError: torch is not installed.
    """
    with _lock:
        ours = _settings()
        os.environ.update(ours)
        try:
            import torch
        except ImportError as exc:
            raise _missing("torch") from exc
        finally:
            for name in ours:
                del os.environ[name]
    return torch


def _settings() -> dict[str, str]:
    chosen = os.environ.get("OMP_WAIT_POLICY", "PASSIVE").upper()
    if "torch" in sys.modules or chosen != "PASSIVE" or "GOMP_SPINCOUNT" in os.environ:
        return {}
    return {name: value for name, value in _WAITING.items() if name not in os.environ}


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


def in_a_thread_that_ends(work: Callable[[], T]) -> T:
    """Run ``work`` in a thread of its own and wait for it.

    A thread that multiplies keeps a pool of OpenMP threads for as long as it lives, and where there are more of those
    than processors all of them sleep at once instead of waiting briefly, the decode thread's too.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="tta-torch") as pool:
        return pool.submit(work).result()


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
