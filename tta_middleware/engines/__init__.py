"""Language models behind the :class:`tta_middleware.protocols.Engine` protocol."""
