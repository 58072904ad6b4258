"""OpenAI's protocol over guarded chat models (extra ``server``); docs/server.md.

The guarantee is the chat model's: this package hands requests in and checked answers out, and decides nothing about
what may leave.
"""

from tta_middleware.server.app import create_app
from tta_middleware.server.settings import Limits, ServerSettings

__all__ = ["Limits", "ServerSettings", "create_app"]
