"""Moderators behind the :class:`tta_middleware.protocols.Moderator` protocol."""
