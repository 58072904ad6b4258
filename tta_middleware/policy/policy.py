"""Pure decisions: what a verdict means for the text it was given for."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import Field, field_validator, model_validator

from tta_middleware.config import Settings
from tta_middleware.errors import ConfigurationError, ModerationError
from tta_middleware.policy.notices import DEFAULT_NOTICE, LANGUAGES, language_of, notice_in
from tta_middleware.types import CATEGORIES, Verdict

Threshold = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(gt=0.0, le=1.0)]

OTHER_CATEGORIES: tuple[str, ...] = (
    "unsafe",
    "elections",
    "financial",
    "health",
    "intellectual-property",
    "law",
    "pii",
    "political",
    "privacy",
    "rules",
    "specialised-advice",
)
"""Categories that some moderators score beside those of the OpenAI API.

``unsafe`` is a guard model's verdict; ``rules`` is how surely a text does what a policy's own rules do not allow.
"""

_CATEGORIES = (*CATEGORIES, *OTHER_CATEGORIES)

LONGEST_RULES = 4_000
"""Characters. They are put before the judging model with every window, so short ones cost less."""


@dataclass(frozen=True, slots=True)
class Decision:
    """A verdict seen through a policy.

    Attributes:
        flagged: some category's score is at or above its threshold, so that the text is withheld.
        excess: the largest weighted score minus threshold over all categories, in [-1, 1]. It is negative exactly when
            the text is safe, and with one threshold for all categories it is the paper's h(y) shifted, so it
            serves the optimisers as loss.
        category: the category that ``excess`` comes from; empty if every scored category is a shadow.
        doubtful: safe, but some category's score is at or above the policy's ``hold`` share of its threshold: a stream
            waits for the next verdict before it releases such text.
        shadowed: the shadow categories whose score is at or above their threshold.
        observed: it would be flagged if the policy did more than observe.
    """

    flagged: bool
    excess: float
    category: str
    shadowed: tuple[str, ...] = ()
    doubtful: bool = False
    observed: bool = False

    @property
    def reached(self) -> bool:
        """Whether some category's score is at or above its threshold, enforced or only observed."""
        return self.flagged or self.observed


Mode: TypeAlias = Literal["enforce", "observe"]

Names = TypeVar("Names", Mapping[str, float], tuple[str, ...])


class Policy(Settings):
    """What is allowed, and what happens when it cannot be told.

    Attributes:
        threshold: a category's score at or above it is flagged; None takes the moderator's own default.
        categories: thresholds of single categories, by OpenAI category name or one of ``OTHER_CATEGORIES``.
        weights: factors in (0, 1] on a category's excess, 1 where none is given. They do not change what is
            flagged, only which categories a repair works on first.
        shadow: categories that are scored and reported but not enforced.
        margin: share of every threshold at which a text counts as flagged already. 1 for answers; the ``repair`` stage
            takes 0.7 unless it says otherwise, since a search ends up close below the limit that it is given, where a
            moderator errs most. The paper's method does without, where no policy names a margin.
        hold: share of a threshold from which on a stream's text is held until a later window scores below it or the
            answer ends; 1 holds nothing that is safe. It changes when text leaves, never what is flagged.
        on_error: ``closed`` withholds an answer that could not be scored, ``open`` lets it pass with the outcome
            ``unchecked``, unless a wrong key or address keeps everything from being scored: that is raised.
        notice: the text shown instead of an answer.
        notices: that text for questions in other languages, by ISO 639-1 code; known are those of
            :data:`tta_middleware.policy.notices.LANGUAGES`. The default notice comes in all of them, one of your own
            is shown as it is for every language that is not named here.
        mode: ``enforce``, or ``observe``: everything is scored and reported as ever, and nothing is withheld, not even
            what could not be scored. What would have been withheld stands in the trace (``mode``, ``observed``).
        rules: what is not allowed besides what the moderator flags anyway, in your own words; for moderators that are a
            language model (``self``, ``guard:MODEL``). Their score is the category ``rules``.
        disguises: whether a text that hides what it says (leetspeak, base64, letters spelled apart, ...) is judged by
            what it says as well, in the same request; each category's higher score counts. One stage that asks for it
            has it done for all, since one moderator serves them.

    Raises:
        ConfigurationError: an unknown category, or a threshold outside [0, 1].
    """

    threshold: Threshold | None = None
    categories: Mapping[str, Threshold] = Field(default_factory=dict)
    weights: Mapping[str, Weight] = Field(default_factory=dict)
    shadow: tuple[str, ...] = ()
    margin: Weight = 1.0
    hold: Weight = 0.7
    on_error: Literal["closed", "open"] = "closed"
    notice: Annotated[str, Field(min_length=1)] = DEFAULT_NOTICE
    notices: Mapping[str, Annotated[str, Field(min_length=1)]] = Field(default_factory=dict)
    mode: Mode = "enforce"
    rules: Annotated[str, Field(max_length=LONGEST_RULES)] | None = None
    disguises: bool = True

    @field_validator("rules")
    @classmethod
    def _worded(cls, rules: str | None) -> str | None:
        if rules is not None and not rules.strip():
            raise ValueError("rules say what is not allowed; leave them out where nothing is to be added")
        return rules

    @field_validator("categories", "weights", "shadow")
    @classmethod
    def _known_categories(cls, categories: Names) -> Names:
        for name in categories:
            if name not in _CATEGORIES:
                close = difflib.get_close_matches(name, _CATEGORIES, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(_CATEGORIES)}"
                raise ValueError(f"unknown category {name!r}; {hint}")
        return categories

    @field_validator("notices")
    @classmethod
    def _known_languages(cls, notices: Mapping[str, str]) -> Mapping[str, str]:
        if unknown := [code for code in notices if code not in LANGUAGES]:
            raise ValueError(f"no language {unknown[0]!r} is told apart; known are {', '.join(LANGUAGES)}")
        return notices

    @classmethod
    def of(cls, value: Policy | float | Mapping[str, float] | None) -> Policy:
        """A policy from what users write: a threshold, thresholds per category, settings by name, a policy, or nothing.

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
            case Mapping() if _names_settings(value):
                return cls(**value)
            case Mapping():
                _refuse_misspelt(value)
                return cls(categories=dict(value))
        raise ConfigurationError(
            f"a policy is a threshold, a mapping of categories to thresholds, or a Policy, not {type(value).__name__}"
        )

    @property
    def least(self) -> float | None:
        """The lowest score that this policy decides anything on; None while the threshold is left open."""
        if self.threshold is None:
            return None
        limit = min([self.threshold, *self.categories.values()])
        # Which category is near its limit matters where they have limits of their own: a stream holds such text.
        return self.margin * limit * (self.hold if self.categories else 1.0)

    def lets_pass(self, error: ModerationError) -> bool:
        """Whether a text passes that could not be scored because of ``error``; under a policy that observes all do.

        Raises:
            ModerationError: the policy would let it pass, but with these settings nothing will ever be scored; an open
                policy is for outages, and the guard would be off without anybody knowing.
        """
        if self.observes:
            return True
        if self.on_error == "closed":
            return False
        if error.of_setup:
            raise error
        return True

    @property
    def observes(self) -> bool:
        """Whether it withholds nothing."""
        return self.mode == "observe"

    def notice_for(self, question: str) -> str:
        """The notice in the language of a question; the plain one where that is not sure."""
        return notice_in(language_of(question), self.notice, self.notices)

    def every_notice(self) -> frozenset[str]:
        """All texts that :meth:`notice_for` may give."""
        return frozenset(notice_in(language, self.notice, self.notices) for language in (None, *LANGUAGES))

    def with_default(self, threshold: float) -> Policy:
        """This policy with ``threshold`` where it leaves the threshold to the moderator."""
        return self if self.threshold is not None else self.model_copy(update={"threshold": threshold})

    def limit(self, category: str) -> float:
        """The score from which on a category is flagged: its threshold, or the common one, by the margin.

        Raises:
            ConfigurationError: the policy leaves the threshold open; see :meth:`with_default`.
        """
        if self.threshold is None:
            raise ConfigurationError("this policy has no threshold yet; call with_default first")
        return self.margin * self.categories.get(category, self.threshold)

    def lowered(self, threshold: float | None, categories: Mapping[str, float]) -> Policy:
        """This policy with each category's threshold lowered to ``threshold`` and to its own in ``categories``.

        None is ever raised, and a category that is named is enforced even if it was a shadow.

        Raises:
            ConfigurationError: a category is unknown, or a threshold outside [0, 1] or left open in this policy.
        """
        if self.threshold is None:
            raise ConfigurationError("this policy has no threshold yet; call with_default first")
        most = 1.0 if threshold is None else threshold
        base = min(self.threshold, most)
        own = {name: min(limit, most) for name, limit in self.categories.items()}
        own |= {name: min(own.get(name, base), limit) for name, limit in categories.items()}
        shadow = tuple(name for name in self.shadow if name not in categories)
        return Policy(**dict(self) | {"threshold": base, "categories": own, "shadow": shadow})

    def decide(self, verdict: Verdict) -> Decision:
        """Hold a verdict against the thresholds. Categories a moderator does not score are not judged.

        Raises:
            ConfigurationError: the policy leaves the threshold open; see :meth:`with_default`.
        """
        limits = {name: self.limit(name) for name in verdict.scores}
        margins = {name: score - limits[name] for name, score in verdict.scores.items()}
        shadowed = tuple(sorted(name for name in self.shadow if margins.pop(name, -1.0) >= 0.0))
        doubtful = any(verdict.scores[name] >= self.hold * limits[name] for name in margins)
        enforced = ((self.weights.get(name, 1.0) * margin, name) for name, margin in margins.items())
        excess, category = max(enforced, default=(-1.0, ""))
        reached = excess >= 0.0
        if self.observes:
            return Decision(False, excess, category, shadowed, observed=reached)
        return Decision(reached, excess, category, shadowed, doubtful=doubtful and not reached)


REPAIR_MARGIN = 0.7
"""Measured in docs/results/: what it gains by the second judge, and what it costs."""

Stage: TypeAlias = Literal["prompt", "output", "repair", "reasoning"]

STAGES: tuple[Stage, ...] = ("prompt", "output", "repair", "reasoning")


def _names_settings(value: Mapping[str, Any]) -> bool:
    """Whether a mapping holds settings of a policy; one name is a category's, too, where a number stands behind it."""
    return any(
        name in Policy.model_fields and (name not in OTHER_CATEGORIES or isinstance(given, str))
        for name, given in value.items()
    )


def _refuse_misspelt(value: Mapping[str, Any]) -> None:
    """Raises ConfigurationError for what is no category and nearly a setting, and would be told as a category."""
    known = (*_CATEGORIES, *Policy.model_fields)
    for name in value:
        close = () if name in _CATEGORIES else difflib.get_close_matches(name, known, n=1)
        if close and close[0] not in _CATEGORIES:
            raise ConfigurationError(f"a policy has no setting {name!r}; did you mean {close[0]!r}?")


class StagePolicies(Settings):
    """One policy per stage of a request.

    Attributes:
        prompt: for what the user wrote.
        output: for the model's first answer.
        repair: for the candidates of a repair, which have to clear a margin below the threshold. It never takes over
            ``on_error="open"`` from another stage: the first answer was flagged, so unscored text passes here only
            where a repair policy says so itself.
        reasoning: for what a model thinks before its answer, in any of its answers; None is as ``output``.
        hidden_reasoning: whether thoughts are checked that nobody gets to see. Where they are ``unchecked``, a trace
            says so; thoughts that are shown are always checked.
        default_margin: the repair stage's margin is the default one, named by nobody.
    """

    prompt: Policy
    output: Policy
    repair: Policy
    reasoning: Policy | None = None
    hidden_reasoning: Literal["checked", "unchecked"] = "checked"
    default_margin: bool = False

    @model_validator(mode="after")
    def _one_mode_for_answers(self) -> StagePolicies:
        if self.repair.mode != self.output.mode:
            raise ConfigurationError("mode of output and repair are one: a repaired answer is an answer")
        return self

    @property
    def observes(self) -> bool:
        """Whether some stage withholds nothing."""
        return any(self.at(stage).observes for stage in STAGES)

    @property
    def mode(self) -> Mode:
        """``observe`` where some stage does."""
        return "observe" if self.observes else "enforce"

    @classmethod
    def of(cls, value: StagePolicies | Policy | float | Mapping[str, Any] | None) -> StagePolicies:
        """From what users write: a policy for all stages, what :meth:`Policy.of` takes, or policies per stage.

        Raises:
            ConfigurationError: a setting is unknown or out of range.
        """
        if isinstance(value, StagePolicies):
            return value
        policy = Policy.of(value)
        stricter = {"margin": REPAIR_MARGIN, "hold": 1.0} if policy.margin == 1.0 else {}
        repair = policy.model_copy(update={"on_error": "closed", **stricter})
        return cls(prompt=policy, output=policy, repair=repair, default_margin=bool(stricter))

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> StagePolicies:
        """From a policy's settings with an optional table of differences per stage.

        A stage's ``categories``, ``weights`` and ``notices`` are laid over the common ones; other settings replace
        them. ``repair`` and ``reasoning`` start from ``output``.

        Raises:
            ConfigurationError: a setting is unknown or out of range.
        """
        common = {key: value for key, value in table.items() if key not in (*STAGES, "hidden_reasoning")}
        prompt = _overlaid(common, table.get("prompt", {}))
        output = _overlaid(common, table.get("output", {}))
        stricter = {"margin": REPAIR_MARGIN, "hold": 1.0} if "margin" not in output else {}
        own = table.get("repair", {})
        repair = _overlaid(output | {"on_error": "closed"} | stricter, own)
        by_default = bool(stricter) and "margin" not in own
        thoughts = Policy(**_overlaid(output, table["reasoning"])) if "reasoning" in table else None
        hidden = {"hidden_reasoning": table["hidden_reasoning"]} if "hidden_reasoning" in table else {}
        return cls(
            prompt=Policy(**prompt),
            output=Policy(**output),
            repair=Policy(**repair),
            reasoning=thoughts,
            default_margin=by_default,
            **hidden,
        )

    def at(self, stage: Stage) -> Policy:
        """The policy of a stage."""
        policy: Policy | None = getattr(self, stage)
        return self.output if policy is None else policy

    @property
    def disguises(self) -> bool:
        """Whether some stage has texts judged by what they say once their disguises are undone."""
        return any(self.at(stage).disguises for stage in STAGES)

    def with_default(self, threshold: float) -> StagePolicies:
        """These policies with ``threshold`` where one leaves the threshold to the moderator."""
        own = [stage for stage in STAGES if getattr(self, stage) is not None]
        return self.model_copy(update={stage: self.at(stage).with_default(threshold) for stage in own})

    def lowered(self, threshold: float | None, categories: Mapping[str, float]) -> StagePolicies:
        """These policies with lower thresholds for answers, repaired ones and thoughts included.

        See :meth:`Policy.lowered`.
        """
        answers: tuple[Stage, ...] = ("output", "repair")
        if self.reasoning is not None:
            answers = (*answers, "reasoning")
        lowered = {str(stage): self.at(stage).lowered(threshold, categories) for stage in answers}
        return self.model_copy(update=lowered)

    def weakened_by(self, threshold: float | None, categories: Mapping[str, float]) -> str | None:
        """Which of these thresholds for answers is above the one in force, so that lowering to it has no effect."""
        asked = {"": threshold} if threshold is not None else {}
        for name, limit in {**asked, **categories}.items():
            most = self.output.categories.get(name, self.output.threshold)
            if most is not None and limit > most:
                which = f"threshold of {name!r}" if name else "threshold"
                return f"the {which} may be lowered only: at most {most:g} here, not {limit:g}"
        return None

    def without_default_margin(self) -> StagePolicies:
        """These policies for a method that wants no margin in the repair stage; one that was named stays."""
        if not self.default_margin:
            return self
        return self.model_copy(update={"repair": self.repair.model_copy(update={"margin": 1.0})})


def _overlaid(common: Mapping[str, Any], stage: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**common, **stage}
    for key in ("categories", "weights", "notices"):
        if isinstance(common.get(key), Mapping) and isinstance(stage.get(key), Mapping):
            merged[key] = {**common[key], **stage[key]}
    return merged
