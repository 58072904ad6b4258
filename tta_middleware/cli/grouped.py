"""Commands whose parameter is a dataclass of options, so that several commands share one definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from inspect import Parameter, signature
from typing import Any, get_type_hints


def grouped(kind: type[Any], **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """For a command with one parameter of type ``kind``, which stands for an option per field.

    Args:
        kind: a dataclass whose fields are annotated as typer wants options.
        defaults: for this command, in place of the fields' own.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        written = signature(command, eval_str=True).parameters.values()
        [group] = [parameter.name for parameter in written if parameter.annotation is kind]

        @wraps(command)
        def called(**words: Any) -> None:
            asked = kind(**{field.name: words.pop(field.name) for field in fields(kind)})
            command(**words, **{group: asked})

        shown = [
            each
            for one in written
            for each in (_options(kind, defaults) if one.name == group else [one.replace(kind=Parameter.KEYWORD_ONLY)])
        ]
        called.__signature__ = signature(command).replace(parameters=shown)  # type: ignore[attr-defined]
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
        return called

    return decorate


def _options(kind: type[Any], defaults: dict[str, Any]) -> list[Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    return [
        Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            default=defaults.get(field.name, field.default),
            annotation=hints[field.name],
        )
        for field in fields(kind)
    ]
