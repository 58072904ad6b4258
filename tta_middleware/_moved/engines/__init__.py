"""What moved out of ``tta_middleware.engines``; that package adds this folder to its ``__path__``."""
