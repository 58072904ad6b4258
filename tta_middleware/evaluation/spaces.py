"""What may be varied of each method when it is tuned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from tta_middleware.config import Settings
from tta_middleware.errors import ConfigurationError
from tta_middleware.methods.base import Method


@dataclass(frozen=True, slots=True)
class Real:
    """A number in [low, high]; ``above`` names a setting that it must not lie below."""

    low: float
    high: float
    log: bool = False
    above: str = ""


@dataclass(frozen=True, slots=True)
class Whole:
    """An integer in [low, high]."""

    low: int
    high: int


@dataclass(frozen=True, slots=True)
class Choice:
    """One of a few words."""

    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Scale:
    """A factor in [low, high] for one field of every item of a list setting, such as the radius of every rung."""

    field: str
    low: float
    high: float


Kind: TypeAlias = Real | Whole | Choice | Scale
Space: TypeAlias = Mapping[str, Kind]

SPACES: Final[Mapping[str, Space]] = {
    "noise": {
        "wave": Whole(1, 6),
        "waves": Whole(2, 12),
        "radius_from": Real(0.1, 1.0),
        "radius_to": Real(0.1, 2.0, above="radius_from"),
    },
    "race": {
        "wave": Whole(1, 3),
        "temperature": Real(0.3, 1.2),
        "growth": Real(0.0, 1.0),
        "ladder": Scale("radius", 0.5, 1.5),
    },
    "resample": {"temperature": Real(0.3, 1.5), "wave": Whole(1, 6)},
    "tsa": {
        "probes": Whole(2, 12),
        "mu": Real(0.02, 0.5, log=True),
        "eta": Real(0.1, 1.5, log=True),
        "kappa": Real(0.0, 0.8),
        "step_norm": Choice(("token", "matrix")),
    },
}
"""What may be varied, by method name."""


def space_of(method: Method) -> Space:
    """What may be varied of ``method``.

    Raises:
        ConfigurationError: nothing is known to vary, or the method's settings are no pydantic model of ours.
    """
    if method.name not in SPACES or not isinstance(method, Settings):
        raise ConfigurationError(f"no search space for the method {method.name!r}; known are {', '.join(SPACES)}")
    return SPACES[method.name]


def as_is(method: Method, name: str, kind: Kind) -> Any:
    """What a trial with the method's own settings suggests."""
    return 1.0 if isinstance(kind, Scale) else getattr(method, name)


def suggest(trial: Any, name: str, kind: Kind) -> Any:
    """What the study's trial tries for one setting."""
    if isinstance(kind, Whole):
        return trial.suggest_int(name, kind.low, kind.high)
    if isinstance(kind, Choice):
        return trial.suggest_categorical(name, list(kind.values))
    if isinstance(kind, Scale):
        return trial.suggest_float(name, kind.low, kind.high)
    low = max(kind.low, trial.params[kind.above]) if kind.above else kind.low
    return trial.suggest_float(name, low, kind.high, log=kind.log)
