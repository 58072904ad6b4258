"""Moderators of other makers behind :class:`tta_middleware.protocols.Moderator`."""
