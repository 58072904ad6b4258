"""Makes open-weight chat models safe while they answer.

Importing this package loads neither torch nor transformers nor langchain; each name is imported when it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tta_middleware.chat_model import TTAChatModel
    from tta_middleware.config import Budget, Windows
    from tta_middleware.errors import TTAError, UnsafeAnswerError
    from tta_middleware.guard.events import Finished, Released, RepairFinished, RepairStarted, RepairStep
    from tta_middleware.guard.guard import Guard
    from tta_middleware.guard.quality import QualityBounds, QualityGate
    from tta_middleware.guard.settings import Repair
    from tta_middleware.methods import TSA, Noise, Race, Resample
    from tta_middleware.policy import Policy
    from tta_middleware.types import CATEGORIES, GuardedAnswer, Message, Sampling, Trace, Verdict

__version__ = "0.1.0"

# Old import paths, which warn: see tta_middleware/_moved.
__path__.append(f"{__path__[0]}/_moved")

_HOMES = {
    "CATEGORIES": "types",
    "TSA": "methods",
    "Budget": "config",
    "Finished": "guard.events",
    "Guard": "guard.guard",
    "GuardedAnswer": "types",
    "Message": "types",
    "Noise": "methods",
    "Policy": "policy.policy",
    "QualityBounds": "guard.quality",
    "QualityGate": "guard.quality",
    "Race": "methods",
    "Released": "guard.events",
    "Repair": "guard.settings",
    "RepairFinished": "guard.events",
    "RepairStarted": "guard.events",
    "RepairStep": "guard.events",
    "Resample": "methods",
    "Sampling": "types",
    "TTAChatModel": "chat_model",
    "TTAError": "errors",
    "Trace": "types",
    "UnsafeAnswerError": "errors",
    "Verdict": "types",
    "Windows": "config",
}

__all__ = [
    "CATEGORIES",
    "TSA",
    "Budget",
    "Finished",
    "Guard",
    "GuardedAnswer",
    "Message",
    "Noise",
    "Policy",
    "QualityBounds",
    "QualityGate",
    "Race",
    "Released",
    "Repair",
    "RepairFinished",
    "RepairStarted",
    "RepairStep",
    "Resample",
    "Sampling",
    "TTAChatModel",
    "TTAError",
    "Trace",
    "UnsafeAnswerError",
    "Verdict",
    "Windows",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
