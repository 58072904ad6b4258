"""One request, from its prompt to its last character: where engine, moderator, policy and search meet."""

from tta_middleware.guard.context import last_user_text, reminded
from tta_middleware.guard.guard import Guard, Release
from tta_middleware.guard.settings import Fallback, FallbackFunction, PromptCheck, Repair, Report

__all__ = [
    "Fallback",
    "FallbackFunction",
    "Guard",
    "PromptCheck",
    "Release",
    "Repair",
    "Report",
    "last_user_text",
    "reminded",
]
