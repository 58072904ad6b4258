"""A moderator that needs neither torch nor a network: linear heads over hashed n-grams, calibrated.

Built by ``python -m training.build``; what it can and cannot do stands in docs/moderator-card.md.
"""

from tta_middleware.moderation.embedded.language import language_supported
from tta_middleware.moderation.embedded.moderator import EmbeddedModerator
from tta_middleware.moderation.embedded.scoring import UNSUPPORTED

__all__ = ["UNSUPPORTED", "EmbeddedModerator", "language_supported"]
