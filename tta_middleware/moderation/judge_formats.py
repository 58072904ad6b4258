"""Guard models as judges of this process: their own formats, recognised by their chat templates.

Their verdicts and categories are those of :mod:`tta_middleware.moderation.adapters.guard_formats`, which asks the same
models behind servers. Their templates word the task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from tta_middleware.errors import ConfigurationError
from tta_middleware.moderation.adapters.guard_formats import (
    GRANITE_GUARDIAN,
    LLAMA_GUARD,
    QWEN3_GUARD,
    SHIELD_GEMMA,
    GuardFormat,
)
from tta_middleware.moderation.judge_prompts import ChatFormat, JudgedText, JudgePrompt, of_conversation

Template = Mapping[str, Any]

_GRANITE_RISKS = {
    "social_bias": "hate",
    "violence": "violence",
    "sexual_content": "sexual",
    "unethical_behavior": "illicit",
    "profanity": "harassment",
}
_SHIELD_GUIDELINES = {
    "Dangerous Content": (
        "illicit",
        "content that harms oneself or others, such as building weapons or explosives, promotion of terrorism, or "
        "instructions for suicide",
    ),
    "Harassment": ("harassment", "malicious, intimidating, bullying or abusive content that targets another person"),
    "Hate Speech": (
        "hate",
        "content that expresses, incites or promotes hate based on race, gender, ethnicity, religion, nationality, "
        "sexual orientation, disability status or caste",
    ),
    "Sexually Explicit Information": (
        "sexual",
        "content that refers to sexual acts or is otherwise lewd, other than for medicine, art or education",
    ),
}
_SHIELD_DANGER = (
    '"No Harm": The text shall not help with violence, weapons, crime or self-harm, shall not hold sexual content, and '
    "shall not harass, threaten or demean people or groups."
)


def _no_arguments(_group: str) -> Template:
    return {}


@dataclass(frozen=True, slots=True)
class GuardJudgeFormat:
    """A family of guard models; its parts are those of :class:`~tta_middleware.moderation.judge_prompts.ChatFormat`.

    Attributes:
        wire: how the same family is read behind a server.
        arguments: of the chat template, for the question on harm (an empty name) and for each group.
        on_rules: arguments of the chat template that put rules to the model; None where it reads none.
    """

    wire: GuardFormat
    prefixes: tuple[str, ...]
    groups: tuple[str, ...] = ()
    categories: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    codes_after: str = ""
    arguments: Callable[[str], Template] = _no_arguments
    on_rules: Callable[[str], Template] | None = None
    leans: bool = False

    @property
    def name(self) -> str:
        return self.wire.name

    @property
    def spellings(self) -> Mapping[str, float]:
        """Each verdict as a tokenizer may meet it."""
        return {
            f"{gap}{spelled}": unsafe
            for word, unsafe in self.wire.verdicts.items()
            for spelled in (word, word.capitalize())
            for gap in ("", " ")
        }

    @property
    def reads_rules(self) -> bool:
        return self.on_rules is not None

    @property
    def codes(self) -> Mapping[str, str]:
        return self.wire.categories

    def harm(self, judged: JudgedText) -> JudgePrompt:
        return JudgePrompt(of_conversation(judged), template=self.arguments(""))

    def breach(self, judged: JudgedText) -> JudgePrompt:
        if self.on_rules is None:
            raise ConfigurationError(f"{self.name} models judge by their own categories; they read no rules")
        return JudgePrompt(of_conversation(judged), template=self.on_rules(judged.rules))

    def kind(self, judged: JudgedText, group: str) -> JudgePrompt:
        return JudgePrompt(of_conversation(judged), template=self.arguments(group))


JudgeFormat: TypeAlias = ChatFormat | GuardJudgeFormat


def _by_group(named: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    return {category: (group,) for group, category in named.items()}


def _granite(group: str) -> Template:
    return {"guardian_config": {"risk_name": group or "harm"}}


def _granite_rules(rules: str) -> Template:
    return {"guardian_config": {"risk_definition": rules}}


def _granite_criteria(group: str) -> Template:
    return {"guardian_config": {"criteria_id": group or "harm"}}


def _granite_own_criteria(rules: str) -> Template:
    return {"guardian_config": {"custom_criteria": rules}}


def _shield(group: str) -> Template:
    if not group:
        return {"guideline": _SHIELD_DANGER}
    return {"guideline": f'"No {group}": The text shall not contain or ask for {_SHIELD_GUIDELINES[group][1]}.'}


def _shield_rules(rules: str) -> Template:
    return {"guideline": f'"House Rules": The text shall not do what is not allowed here: {rules}'}


LLAMA_GUARD_JUDGE = GuardJudgeFormat(LLAMA_GUARD, ("", "\n\n"), codes_after="unsafe\nS")
GRANITE_JUDGE = GuardJudgeFormat(
    GRANITE_GUARDIAN,
    ("",),
    groups=tuple(_GRANITE_RISKS),
    categories=_by_group(_GRANITE_RISKS),
    arguments=_granite,
    on_rules=_granite_rules,
)
GRANITE_33_JUDGE = replace(
    GRANITE_JUDGE,
    prefixes=("<score>", "<think>\n</think>\n\n<score>"),
    arguments=_granite_criteria,
    on_rules=_granite_own_criteria,
)
"""From version 3.3 on: criteria in place of risks, and a verdict between marks."""
QWEN3_GUARD_JUDGE = GuardJudgeFormat(QWEN3_GUARD, ("Safety:",), codes_after=" Unsafe\nCategories:")
SHIELD_GEMMA_JUDGE = GuardJudgeFormat(
    SHIELD_GEMMA,
    ("", "\n"),
    groups=tuple(_SHIELD_GUIDELINES),
    categories=_by_group({group: category for group, (category, _) in _SHIELD_GUIDELINES.items()}),
    arguments=_shield,
    on_rules=_shield_rules,
)


def format_for(template: str, chat: ChatFormat) -> JudgeFormat:
    """The format of the model whose chat template this is; ``chat`` where it is no guard model's.

    Qwen3Guard comes before Llama Guard, whose marks it uses as well.
    """
    if "Controversial" in template and "Safety:" in template:
        return QWEN3_GUARD_JUDGE
    if "UNSAFE CONTENT CATEGORIES" in template and "unsafe" in template:
        return LLAMA_GUARD_JUDGE
    if "guardian_config" in template:
        return GRANITE_33_JUDGE if "criteria_id" in template else GRANITE_JUDGE
    if "guideline" in template and "policy expert" in template:
        return SHIELD_GEMMA_JUDGE
    return chat
