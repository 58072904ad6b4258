"""The chat model behind a guard, with or without tools and settings bound to it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler, BaseCallbackManager
from langchain_core.globals import get_llm_cache
from langchain_core.language_models import BaseChatModel
from langchain_core.runnables import RunnableBinding

from tta_middleware.chat_model import TTAChatModel
from tta_middleware.errors import ConfigurationError


def base_model(model: Any) -> BaseChatModel:
    """The chat model under whatever is bound to it.

    Raises:
        ConfigurationError: there is none.
    """
    while isinstance(model, RunnableBinding):
        model = model.bound
    if not isinstance(model, BaseChatModel):
        raise ConfigurationError(f"the guarded model is a LangChain chat model, not {type(model).__name__}")
    return model


def bound_settings(model: Any) -> dict[str, Any]:
    """What is bound to a chat model, tools among it; two models that differ in it give different answers."""
    if not isinstance(model, RunnableBinding):
        return {}
    return bound_settings(model.bound) | dict(model.kwargs)


def model_name(model: BaseChatModel) -> str:
    """What a chat model calls the model it runs."""
    names = (getattr(model, name, None) for name in ("model_name", "model", "model_id"))
    return next((name for name in names if isinstance(name, str) and name), "")


def observers(model: Any) -> list[Any]:
    """The callback handlers that a model was built with or that are bound to it."""
    if isinstance(model, RunnableBinding):
        return handlers(model.config.get("callbacks")) + observers(model.bound)
    return handlers(model.callbacks)


def unobserved(model: Any) -> Any:
    """The model without its callbacks, listeners and cache: none of them may see or keep what was not checked.

    The same object where there are none, since a copy would not share the state of a model that keeps some.
    """
    if isinstance(model, RunnableBinding):
        config = {name: value for name, value in model.config.items() if name != "callbacks"}
        return model.model_copy(update={"bound": unobserved(model.bound), "config": config, "config_factories": []})
    if model.callbacks or model.cache or get_llm_cache():
        return model.model_copy(update={"callbacks": None, "cache": False})
    return model


def observed(model: Any, handler: BaseCallbackHandler) -> Any:
    """The model with one more observer; its type stays, since other middleware goes by it."""
    if isinstance(model, RunnableBinding):
        return model.model_copy(update={"bound": observed(model.bound, handler)})
    return model.model_copy(update={"callbacks": _with_handler(model.callbacks, handler)})


def _with_handler(callbacks: Any, handler: BaseCallbackHandler) -> Any:
    if not isinstance(callbacks, BaseCallbackManager):
        return [*(callbacks or ()), handler]
    manager = callbacks.copy()
    manager.add_handler(handler, inherit=False)
    return manager


def handlers(callbacks: Any) -> list[Any]:
    """Of a list or a manager of callbacks."""
    return list(getattr(callbacks, "handlers", callbacks) or [])


_OF_THE_GUARD = ("moderator", "policy", "on_flagged", "repair_model", "replacement", "release")


def refuse(given: Collection[str], base: BaseChatModel) -> None:
    """A model that takes any setting would take the guard's, too, and nobody would know that it changes nothing.

    Raises:
        ConfigurationError: a call has a setting of the guard around ``base``, which is none of that model's.
    """
    for name in _OF_THE_GUARD:
        if name in given and not isinstance(base, TTAChatModel):
            raise ConfigurationError(
                f"a call has the inner model's settings, and {name!r} is the guard's: "
                f"write model.model_copy(update={{{name!r}: ...}})"
            )
