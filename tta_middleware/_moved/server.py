"""Moved to ``tta_middleware.moderation.server``."""

from tta_middleware._moved import stand_for

stand_for(__name__, "tta_middleware.moderation.server")
