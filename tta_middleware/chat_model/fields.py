"""Types of the chat model's settings; each checks its value, in the constructor and per call alike."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from langchain_core.runnables import Runnable
from pydantic import AfterValidator, BeforeValidator

from tta_middleware.config import check_takes_one
from tta_middleware.errors import ConfigurationError
from tta_middleware.policy.file import PolicyFile
from tta_middleware.registry import moderators_in, resolve_engine, resolve_method, resolve_moderator


def _model(value: Any) -> Any:
    if not isinstance(value, str):
        resolve_engine(value)
    elif not value.strip():
        raise ConfigurationError("the model is an empty text; give a name, a folder or an Engine")
    return value


def _moderator(value: Any) -> Any:
    if isinstance(value, str):
        moderators_in(value)
    else:
        resolve_moderator(value)
    return value


def _method(value: Any) -> Any:
    resolve_method(value)
    return value


def _policy_file(value: Any) -> PolicyFile | None:
    if not isinstance(value, str | PathLike | PolicyFile | None):
        raise ConfigurationError(f"policies is a TOML or YAML file, by its path, not {type(value).__name__}")
    return PolicyFile(Path(value)) if isinstance(value, str | PathLike) else value


def _fallback(value: Any) -> Any:
    if value in ("refuse", "raise") or isinstance(value, Runnable):
        return value
    if callable(value):
        check_takes_one("a fallback", value, "lambda messages: 'Ask a colleague.'")
        return value
    raise ConfigurationError(
        f"fallback is 'refuse', 'raise', a function of the messages or a Runnable, not {value!r:.40}"
    )


def _texts(value: Any) -> Any:
    """One text is a list of one."""
    return [value] if isinstance(value, str) else value


ModelSetting: TypeAlias = Annotated[Any, AfterValidator(_model)]
ModeratorSetting: TypeAlias = Annotated[Any, AfterValidator(_moderator)]
MethodSetting: TypeAlias = Annotated[Any, AfterValidator(_method)]
PolicyFileSetting: TypeAlias = Annotated[Any, AfterValidator(_policy_file)]
FallbackSetting: TypeAlias = Annotated[Any, AfterValidator(_fallback)]
StopStrings: TypeAlias = Annotated[list[str], BeforeValidator(_texts)]
