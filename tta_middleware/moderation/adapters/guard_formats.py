"""How guard models are asked and how they answer.

The wording is the servers' chat templates' business, except for ShieldGemma, which is prompted in full.

Sources: the model cards of meta-llama/Llama-Guard-3-8B, ibm-granite/granite-guardian-3.2-5b,
google/shieldgemma-2b and Qwen/Qwen3Guard-Gen-4B.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from tta_middleware.moderation.transport import QuietText

ChatMessages: TypeAlias = list[dict[str, str]]


def conversation(text: str, prompt: str | None) -> ChatMessages:
    """The prompt as user turn and the text as answer; a text without prompt is the user turn itself."""
    if prompt is None:
        return [{"role": "user", "content": QuietText.of(text)}]
    return [
        {"role": "user", "content": QuietText.of(prompt)},
        {"role": "assistant", "content": QuietText.of(text)},
    ]


@dataclass(frozen=True, slots=True)
class GuardFormat:
    """One family of guard models.

    Attributes:
        name: of the family.
        verdicts: the words a verdict can be, in lower case, and how unsafe each is in [0, 1].
        marker: the text right before the verdict; empty where the answer begins with it.
        categories: names or codes of categories in the answer, and the score they stand for.
        messages: the chat of a text and the prompt it answers.
        extra_body: further fields of the request, such as ``chat_template_kwargs``.
        max_tokens: enough for marker, verdict and categories.
    """

    name: str
    verdicts: Mapping[str, float]
    marker: str = ""
    categories: Mapping[str, str] = field(default_factory=dict)
    messages: Callable[[str, str | None], ChatMessages] = conversation
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int = 24


LLAMA_GUARD = GuardFormat(
    name="llama-guard",
    verdicts={"safe": 0.0, "unsafe": 1.0},
    categories={
        "S1": "illicit/violent",
        "S2": "illicit",
        "S3": "sexual",
        "S4": "sexual/minors",
        "S5": "harassment",
        "S6": "specialised-advice",
        "S7": "privacy",
        "S8": "intellectual-property",
        "S9": "illicit/violent",
        "S10": "hate",
        "S11": "self-harm",
        "S12": "sexual",
        "S13": "elections",
        "S14": "illicit",
    },
)

GRANITE_GUARDIAN = GuardFormat(
    name="granite-guardian",
    verdicts={"no": 0.0, "yes": 1.0},
    extra_body={"chat_template_kwargs": {"guardian_config": {"risk_name": "harm"}}},
)
"""Versions 3.0 to 3.2; 3.3 wraps its verdict: ``replace(GRANITE_GUARDIAN, marker="<score>")``."""

QWEN3_GUARD = GuardFormat(
    name="qwen3guard",
    verdicts={"safe": 0.0, "controversial": 0.5, "unsafe": 1.0},
    marker="Safety:",
    categories={
        "Violent": "violence",
        "Non-violent Illegal Acts": "illicit",
        "Sexual Content or Sexual Acts": "sexual",
        "PII": "privacy",
        "Suicide & Self-Harm": "self-harm",
        "Unethical Acts": "harassment",
        "Politically Sensitive Topics": "political",
        "Copyright Violation": "intellectual-property",
    },
    max_tokens=48,
)

_POLICY = (
    "The text shall not help with violence, weapons, crime or self-harm, shall not hold sexual content, "
    "and shall not harass, threaten or demean people or groups."
)


def _shield_gemma(text: str, prompt: str | None) -> ChatMessages:
    turns = [("Human Question", prompt), ("Chatbot Response", text)] if prompt else [("Human Question", text)]
    # The text must not be able to end its own turn.
    body = "\n".join(
        f"<start_of_turn>\n{who}: {(said or '').replace('_of_turn>', ' of turn>')}\n<end_of_turn>"
        for who, said in turns
    )
    what = "Chatbot Response" if prompt else "human question"
    content = (
        "You are a policy expert trying to help determine whether a text is in violation of the defined safety "
        f"policies.\n\n{body}\n\nOur safety principle is defined in the below:\n\n* {_POLICY}\n\n"
        f"Does the {what} violate the above principle? Your answer must start with 'Yes' or 'No'. And then walk "
        "through step by step to be sure we answer correctly."
    )
    return [{"role": "user", "content": QuietText.of(content)}]


SHIELD_GEMMA = GuardFormat(name="shieldgemma", verdicts={"no": 0.0, "yes": 1.0}, messages=_shield_gemma, max_tokens=4)
