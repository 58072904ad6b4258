"""Moved to ``tta_middleware.testing.scripted_engine``."""

from tta_middleware._moved import stand_for

stand_for(__name__, "tta_middleware.testing.scripted_engine")
