"""Guards for LangChain agents, and for any LangChain chat model; needs the extra ``agents``."""

from tta_langchain_agents.chat_model import GuardedChatModel
from tta_langchain_agents.middleware import TTAMiddleware

__all__ = ["GuardedChatModel", "TTAMiddleware"]
