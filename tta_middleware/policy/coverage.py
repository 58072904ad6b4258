"""Whether somebody scores what a policy has thresholds for, and scores what a text says beneath a disguise.

A threshold for a category that the moderator does not score enforces nothing, and nothing shows it: every verdict
passes. So it is an error, not a warning: who wrote the threshold believes in it, and logs are read after the fact.

Moderators declare what they score in an optional attribute ``categories``. One that does not is checked at its first
verdict. Everything that holds texts against policies takes its moderator through :func:`covering`.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Sequence
from typing import Protocol, Self, runtime_checkable

from tta_middleware.errors import ConfigurationError
from tta_middleware.policy import STAGES, Policy, StagePolicies
from tta_middleware.policy.disguises import plain_form
from tta_middleware.policy.verdicts import in_context, verdicts_on
from tta_middleware.protocols import Moderator
from tta_middleware.types import Message, ModerationContext, RequestScope, Subject, Verdict, stricter


def categories_of(moderator: object) -> tuple[str, ...] | None:
    """The categories that a moderator declares; None if it declares none."""
    declared: Iterable[str] | None = getattr(moderator, "categories", None)
    return None if declared is None else tuple(declared)


def enforced(policies: StagePolicies) -> list[str]:
    """The categories that have a threshold of their own in some stage and are no shadows there, sorted."""
    stages = [policies.at(stage) for stage in STAGES]
    return sorted({name for policy in stages for name in policy.categories if name not in policy.shadow})


def check_scored(policies: StagePolicies, categories: Collection[str] | None, moderator: str) -> None:
    """Whether all enforced categories are among those that the moderator of that name scores; None is not known.

    Raises:
        ConfigurationError: some are not.
    """
    if categories is None:
        return
    if missing := [name for name in enforced(policies) if name not in categories]:
        raise ConfigurationError(
            f"the policy has a threshold for {', '.join(missing)}, which moderator {moderator!r} does not score, so it "
            "would enforce nothing; leave it out, or choose a moderator (or an Ensemble) that scores it. A moderator "
            "of your own names what it scores in an attribute 'categories'"
        )


def check_rules(policies: StagePolicies, *, read: bool, moderator: str) -> None:
    """Whether the moderator of that name judges by rules, where ``policies`` have any.

    Raises:
        ConfigurationError: it does not, or a threshold is for rules that nobody has written.
    """
    for stage in STAGES:
        policy = policies.at(stage)
        if policy.rules and not read:
            raise ConfigurationError(
                f"the policy has rules of its own, which moderator {moderator!r} cannot read, so they would enforce "
                "nothing; leave them out, or choose one that is a language model (self, guard:MODEL, self+local)"
            )
        if "rules" in policy.categories and not policy.rules:
            raise ConfigurationError("the policy has a threshold for 'rules' and no rules; write down what they say")


def reads_rules(moderator: object) -> bool:
    """Whether a moderator judges by a policy's own rules."""
    return bool(getattr(moderator, "reads_rules", False))


def grows(moderator: object) -> bool:
    """Whether a text that grows costs a moderator only what is new."""
    return bool(getattr(moderator, "grows", False))


def told(
    moderator: Moderator,
    policy: Policy,
    subject: Subject = "answer",
    *,
    conversation: Sequence[Message] = (),
    scope: RequestScope | None = None,
) -> Moderator:
    """The moderator, told what the texts are that ``policy`` will be held against, if it wants to know."""
    kinds = tuple(sorted({*policy.categories, *policy.shadow}))
    asked = ModerationContext(subject, policy.rules or "", policy.least, kinds, tuple(conversation), scope)
    return in_context(moderator, asked)


def covering(moderator: Moderator, policies: StagePolicies) -> Moderator:
    """The moderator, if it scores what ``policies`` enforce, as they want it asked.

    One that declares nothing is watched at its first verdict. Disguised texts are judged in both forms, unless the
    policies do without, or an inner moderator does so already (its attribute ``undisguises``).

    Raises:
        ConfigurationError: it does not.
    """
    categories = categories_of(moderator)
    check_scored(policies, categories, moderator.name)
    check_rules(policies, read=reads_rules(moderator), moderator=moderator.name)
    moderator = fitted(moderator, policies)
    watched = moderator if categories is not None or not enforced(policies) else _Undeclared(moderator, policies)
    return Undisguising(watched) if policies.disguises and not undisguises(moderator) else watched


def fitted(moderator: Moderator, policies: StagePolicies) -> Moderator:
    """The moderator as those policies want it asked; itself where its ways do not depend on them.

    Whatever stands around another moderator hands this on: a cascade's bounds are those of the thresholds in force.
    """
    return moderator.under(policies) if isinstance(moderator, _Fitting) else moderator


def undisguises(moderator: object) -> bool:
    """Whether a moderator judges disguised texts in both forms by itself."""
    return bool(getattr(moderator, "undisguises", False))


class _Around:
    """Stands in for ``inner``, told of a context where that wants to know."""

    def __init__(self, inner: Moderator) -> None:
        self._inner = inner
        self.name, self.default_threshold = inner.name, inner.default_threshold
        self.reads_rules, self.grows = reads_rules(inner), grows(inner)

    def in_context(self, context: ModerationContext) -> Self:
        """The same around ``inner`` in that context; itself where that does not want to know."""
        return self._around(in_context(self._inner, context))

    def under(self, policies: StagePolicies) -> Self:
        """The same around ``inner`` under those policies; itself where that does not depend on them."""
        return self._around(fitted(self._inner, policies))

    def _around(self, inner: Moderator) -> Self:
        if inner is self._inner:
            return self
        twin = copy.copy(self)
        twin._inner = inner
        return twin

    async def aclose(self) -> None:
        await self._inner.aclose()


class Undisguising(_Around):
    """A moderator that is asked about what a text says beside the text as it was written, in one request.

    The stricter verdict counts (:func:`tta_middleware.types.stricter`). Text without a disguise is asked about once.
    Forms are taken of whole texts: whatever has to cut long ones, or keeps verdicts, stands inside.
    """

    undisguises = True
    max_characters: int | None = None

    def __init__(self, inner: Moderator) -> None:
        super().__init__(inner)
        self.categories: tuple[str, ...] | None = categories_of(inner)

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        """One verdict per text: the stricter one where it has two forms.

        Raises:
            ModerationError: the inner moderator's.
        """
        forms = [plain_form(text) for text in texts]
        hidden = [form for form in forms if form is not None]
        verdicts = await verdicts_on(self._inner, [*texts, *hidden], prompt=prompt)
        beneath = iter(verdicts[len(texts) :])
        written = zip(verdicts, forms, strict=False)
        return [one if form is None else stricter([one, next(beneath)]) for one, form in written]


@runtime_checkable
class _Fitting(Moderator, Protocol):
    """A moderator whose ways depend on the thresholds that are in force."""

    def under(self, policies: StagePolicies) -> Moderator:
        """The same one for those policies; quick, since it is asked for with every request."""
        ...


class _Undeclared(_Around):
    """A moderator that does not say what it scores; its first verdict does."""

    def __init__(self, inner: Moderator, policies: StagePolicies) -> None:
        super().__init__(inner)
        self._policies = policies
        self.max_characters: int | None = getattr(inner, "max_characters", None)
        self.overlap: int | None = getattr(inner, "overlap", None)
        self._seen = False

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        """The inner moderator's verdicts.

        Raises:
            ConfigurationError: the first one has no score for something that the policies enforce.
        """
        verdicts = await verdicts_on(self._inner, texts, prompt=prompt)
        if verdicts and not self._seen:
            check_scored(self._policies, verdicts[0].scores, self.name)
            self._seen = True
        return verdicts
