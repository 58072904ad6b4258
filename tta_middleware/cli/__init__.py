"""The ``tta`` command: parse, build, call. Nothing heavy is imported before a command needs it."""

from tta_middleware.cli.app import main

__all__ = ["main"]
