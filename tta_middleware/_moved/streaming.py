"""Moved to ``tta_middleware.guard.moderated``."""

from tta_middleware._moved import stand_for

stand_for(__name__, "tta_middleware.guard.moderated")
