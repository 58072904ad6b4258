"""The guard as a LangChain chat model."""

from tta_middleware.chat_model.model import TTAChatModel

__all__ = ["TTAChatModel"]
