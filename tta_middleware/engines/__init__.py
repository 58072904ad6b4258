"""Language models behind the :class:`tta_middleware.protocols.Engine` protocol."""

# An old import path, which warns: see tta_middleware/_moved.
__path__.append(f"{__path__[0]}/../_moved/engines")
