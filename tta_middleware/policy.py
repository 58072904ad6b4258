"""Pure decisions: what a verdict means for the text it was given for."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, field_validator

from tta_middleware.config import Settings
from tta_middleware.errors import ConfigurationError
from tta_middleware.types import CATEGORIES, Verdict

DEFAULT_NOTICE = "I can't help with that request."

Threshold = Annotated[float, Field(ge=0.0, le=1.0)]


@dataclass(frozen=True, slots=True)
class Decision:
    """A verdict seen through a policy.

    Attributes:
        flagged: some category's score is at or above its threshold.
        excess: the largest score minus threshold over all categories, in [-1, 1]. It is negative exactly when
            the text is safe, and with one threshold for all categories it is the paper's h(y) shifted, so it
            serves the optimisers as loss.
        category: the category that ``excess`` comes from.
    """

    flagged: bool
    excess: float
    category: str


class Policy(Settings):
    """What is allowed, and what happens when it cannot be told.

    Attributes:
        threshold: a category's score at or above it is flagged; None takes the moderator's own default.
        categories: thresholds of single categories, by OpenAI category name.
        on_error: ``closed`` withholds an answer that could not be scored, ``open`` lets it pass; either way
            the trace says so.
        notice: the text shown instead of an answer.

    Raises:
        ConfigurationError: an unknown category, or a threshold outside [0, 1].
    """

    threshold: Threshold | None = None
    categories: Mapping[str, Threshold] = Field(default_factory=dict)
    on_error: Literal["closed", "open"] = "closed"
    notice: Annotated[str, Field(min_length=1)] = DEFAULT_NOTICE

    @field_validator("categories")
    @classmethod
    def _known_categories(cls, categories: Mapping[str, float]) -> Mapping[str, float]:
        for name in categories:
            if name not in CATEGORIES:
                close = difflib.get_close_matches(name, CATEGORIES, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(CATEGORIES)}"
                raise ValueError(f"unknown category {name!r}; {hint}")
        return categories

    @classmethod
    def of(cls, value: Policy | float | Mapping[str, float] | None) -> Policy:
        """A policy from what users write: one threshold, thresholds per category, a policy, or nothing.

        Raises:
            ConfigurationError: the value is none of these or out of range.
        """
        match value:
            case Policy():
                return value
            case None:
                return cls()
            case bool():
                raise ConfigurationError(f"a policy cannot be {value!r}; give a threshold in [0, 1]")
            case int() | float():
                return cls(threshold=float(value))
            case Mapping():
                return cls(categories=dict(value))
        raise ConfigurationError(
            f"a policy is a threshold, a mapping of categories to thresholds, or a Policy, not {type(value).__name__}"
        )

    def with_default(self, threshold: float) -> Policy:
        """This policy with ``threshold`` where it leaves the threshold to the moderator."""
        return self if self.threshold is not None else self.model_copy(update={"threshold": threshold})

    def decide(self, verdict: Verdict) -> Decision:
        """Hold a verdict against the thresholds. Categories a moderator does not score are not judged.

        Raises:
            ConfigurationError: the policy leaves the threshold open; see :meth:`with_default`.
        """
        if self.threshold is None:
            raise ConfigurationError("this policy has no threshold yet; call with_default first")
        excess, category = max(
            (score - self.categories.get(name, self.threshold), name) for name, score in verdict.scores.items()
        )
        return Decision(flagged=excess >= 0.0, excess=excess, category=category)
