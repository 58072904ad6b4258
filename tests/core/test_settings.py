"""What holds of all settings, whichever class has them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import tta_middleware
from tta_middleware import Policy, Sampling, TTAChatModel
from tta_middleware.config import Settings, _kinds_in
from tta_middleware.errors import ConfigurationError
from tta_middleware.policy import StagePolicies
from tta_middleware.testing.scripted_engine import ScriptedEngine


def every_kind(base: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for kind in base.__subclasses__():
        yield kind
        yield from every_kind(kind)


def numbers() -> list[Any]:
    """Each setting of each class that takes numbers, and no truth values."""
    root = Path(tta_middleware.__file__).parent
    for file in sorted(root.rglob("*.py")):
        if "(Settings)" not in file.read_text(encoding="utf-8"):
            continue
        module = ".".join(file.with_suffix("").relative_to(root.parent).parts)
        importlib.import_module(module.removesuffix(".__init__"))
    found = [
        (kind, name)
        for kind in (TTAChatModel, *every_kind(Settings))
        for name, field in kind.model_fields.items()
        if {int, float} & set(_kinds_in(field.annotation)) and not {bool, Any} & set(_kinds_in(field.annotation))
    ]
    return [pytest.param(kind, name, id=f"{kind.__name__}.{name}") for kind, name in found]


NUMBERS = numbers()


def test_the_numbers_are_found() -> None:
    found = {str(number.id) for number in NUMBERS}
    assert found >= {"Policy.threshold", "Policy.categories", "Budget.seconds", "Windows.first", "Noise.radius_to"}
    assert found >= {"TTAChatModel.max_new_tokens", "TTAChatModel.temperature", "TTAChatModel.seed"}
    assert not found & {"Policy.disguises", "Policy.notice", "TTAChatModel.streaming", "TTAChatModel.policy"}


@pytest.mark.parametrize(("kind", "name"), NUMBERS)
def test_true_is_no_number(kind: type[BaseModel], name: str) -> None:
    with pytest.raises((ConfigurationError, ValueError), match="takes a number, not True or False"):
        kind(**{name: True})


def test_a_threshold_of_true_would_flag_nothing() -> None:
    for written in ({"categories": {"hate": True}}, {"threshold": False}):
        with pytest.raises(ConfigurationError, match="takes a number"):
            Policy(**written)
    with pytest.raises(ConfigurationError, match="takes a number"):
        StagePolicies.from_table({"threshold": True})


@pytest.mark.parametrize("name", ["max_new_tokens", "temperature", "top_p", "seed"])
@pytest.mark.parametrize("value", [True, "1", None])
def test_sampling_takes_numbers(name: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} takes a number, not {type(value).__name__}"):
        Sampling(**{name: value})


def test_true_is_no_number_of_a_call() -> None:
    model = TTAChatModel(model=ScriptedEngine("Roses."))
    with pytest.raises(ConfigurationError, match="max_new_tokens takes a number"):
        model.invoke("hello", max_tokens=True)
