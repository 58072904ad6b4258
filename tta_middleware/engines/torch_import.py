"""The one place where torch and transformers are imported.

Both are heavy and optional, so nothing imports them before a model is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from tta_middleware.aio import process as _process
from tta_middleware.defaults import openmp_settings
from tta_middleware.errors import MissingExtraError

if TYPE_CHECKING:
    from types import ModuleType

T = TypeVar("T")

INSTALL_LOCAL = 'pip install "tta-middleware[local]"'

_lock = _process.Lock()


def import_torch() -> ModuleType:
    """torch, with OpenMP threads that wait briefly for each other where this import is the first.

    OpenMP reads its settings only when its library loads, so they are in the environment for just this import: see
    :func:`~tta_middleware.defaults.openmp_settings`.

    Raises:
        MissingExtraError: torch is not installed.
    """
    with _lock:
        ours = openmp_settings()
        os.environ.update(ours)
        try:
            import torch
        except ImportError as exc:
            raise _missing("torch") from exc
        finally:
            for name in ours:
                del os.environ[name]
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
