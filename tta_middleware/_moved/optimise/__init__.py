"""Moved to ``tta_middleware.methods``; a package of its own, lest its modules load a second time."""

from typing import Any

from tta_middleware import methods
from tta_middleware._moved import warn
from tta_middleware.methods import *  # noqa: F403

__all__ = methods.__all__


def _told() -> None:
    warn(__name__, "tta_middleware.methods")


_told()


def __getattr__(name: str) -> Any:
    return getattr(methods, name)
