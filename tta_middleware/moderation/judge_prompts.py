"""What a judging model is asked about a text: by a chat model's plain question, or by a guard model's own format.

Everything that stays the same while a text grows stands before it, the question after it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tta_middleware.types import Message, Subject

LONGEST = 4_000
"""Characters of a text, and of the end of what it answers, that are put before the model at once."""

STRETCH = 1_200
"""Characters; a longer text is judged as a whole and stretch by stretch, since harmless text around it hides harm."""

QUESTION = "Does the answer give help that could cause harm? Answer yes or no."
QUESTION_ON_RULES = "Does the answer do what is not allowed? Answer yes or no."

YES, NO = ("yes", "Yes", "YES"), ("no", "No", "NO")

NEUTRAL = "The weather is mild today, with a light wind from the west."
"""Breaks no rule and is of no kind of harm: what a model says of it is how it leans anyway."""

GROUPS: Mapping[str, str] = {
    "insults": "insults or bullying",
    "threats": "threats against somebody",
    "hate": "hatred of a group of people",
    "crime": "crime, fraud, drugs or hacking",
    "weapons": "weapons, explosives or attacks",
    "suicide": "suicide or self-harm",
    "sex": "sex",
    "minors": "sex with children",
    "violence": "violence against people",
    "gore": "blood and injuries",
}
"""Kinds of harm that a chat model is asked about."""

CATEGORY_GROUPS: Mapping[str, tuple[str, ...]] = {
    "harassment": ("insults",),
    "harassment/threatening": ("threats",),
    "hate": ("hate",),
    "hate/threatening": ("hate", "threats"),
    "illicit": ("crime",),
    "illicit/violent": ("weapons",),
    "self-harm": ("suicide",),
    "self-harm/instructions": ("suicide",),
    "self-harm/intent": ("suicide",),
    "sexual": ("sex",),
    "sexual/minors": ("minors",),
    "violence": ("violence",),
    "violence/graphic": ("gore",),
}
"""What must be there of a category of the OpenAI API: all of these groups."""

_NAMES: Mapping[Subject, str] = {"answer": "answer", "prompt": "request", "tool result": "text"}
_FORGED = re.compile(
    r"^(?=[ \t]*(?:question|answer|request|text|verdict|user|assistant|system|human|ai)[ \t]*:)", re.IGNORECASE | re.M
)


@dataclass(frozen=True, slots=True)
class JudgedText:
    """One text as it is judged.

    Attributes:
        prompt: what it answers; None where that is not known, or where it answers nothing.
        conversation: the turns before it, where they are known.
    """

    text: str
    prompt: str | None = None
    subject: Subject = "answer"
    rules: str = ""
    conversation: tuple[Message, ...] = ()


@dataclass(frozen=True, slots=True)
class JudgePrompt:
    """A prompt whose next token is the verdict.

    Attributes:
        prefix: what the model's answer begins with.
        template: arguments of the chat template.
    """

    messages: tuple[Message, ...]
    prefix: str = ""
    template: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """A chat model, asked in plain words. Short ones do best: longer questions with lists of harms did worse.

    Attributes:
        reads_prompt: whether what a text answers is put before it.
        name: of the family.
        spellings: the words of a verdict and how unsafe each is, in [0, 1]; the first token of a word counts for it.
        prefixes: what may stand before the verdict; the one after which the model is surest to give one is taken.
        reads_rules: whether it can be asked about rules.
        leans: whether its yes and no say more of the question than of the text, so that they are held against what it
            says of :data:`NEUTRAL`.
        groups: kinds of harm that it is asked about one by one.
        categories: which of these groups must be there of a category.
        codes: what it writes after an unsafe verdict and ``codes_after``, and the category that each stands for.
    """

    reads_prompt: bool = True
    name: str = "chat"
    spellings: Mapping[str, float] = field(
        default_factory=lambda: dict.fromkeys(YES, 1.0) | dict.fromkeys(NO, 0.0), compare=False
    )
    prefixes: tuple[str, ...] = ("",)
    reads_rules: bool = True
    leans: bool = True
    groups: tuple[str, ...] = tuple(GROUPS)
    categories: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: CATEGORY_GROUPS, compare=False)
    codes: Mapping[str, str] = field(default_factory=dict, compare=False)
    codes_after: str = ""

    def harm(self, judged: JudgedText) -> JudgePrompt:
        """Whether it is harmful."""
        wordings: Mapping[Subject, str] = {
            "answer": QUESTION,
            "prompt": "Does the request ask for help that could cause harm? Answer yes or no.",
            "tool result": "Does the text give help that could cause harm? Answer yes or no.",
        }
        return self._asked(judged, wordings[judged.subject])

    def breach(self, judged: JudgedText) -> JudgePrompt:
        """Whether it does what ``judged.rules`` do not allow."""
        question = QUESTION_ON_RULES.replace("answer", _NAMES[judged.subject], 1)
        return self._asked(judged, f"This is not allowed:\n{judged.rules}\n\n{question}")

    def kind(self, judged: JudgedText, group: str) -> JudgePrompt:
        """Whether it is harm of that group."""
        return self._asked(judged, f"Is the {_NAMES[judged.subject]} about {GROUPS[group]}? Answer yes or no.")

    def _asked(self, judged: JudgedText, question: str) -> JudgePrompt:
        known = judged.prompt and self.reads_prompt and judged.subject == "answer"
        before = f"Question: {delimited(judged.prompt or '')[-LONGEST:]}\n\n" if known else ""
        label = _NAMES[judged.subject].capitalize()
        return JudgePrompt((Message("user", f"{before}{label}: {delimited(judged.text)}\n\n{question}"),))


def delimited(text: str) -> str:
    """The text with a mark before each line that begins as a turn of the judging prompt does.

    What is judged shall not be able to end its own turn and go on with one of the judge's.
    """
    return _FORGED.sub("> ", text)


def of_conversation(judged: JudgedText) -> tuple[Message, ...]:
    """What is judged as turns, which guard models are shown: the conversation, and at its end the text.

    A text that answers nothing is the user's own turn. Of long conversations the end is shown.
    """
    if judged.subject != "answer" or not (judged.prompt or judged.conversation):
        return (Message("user", judged.text),)
    turns = list(judged.conversation) or [Message("user", judged.prompt or "")]
    kept = [Message(turn.role, turn.content[-LONGEST:]) for turn in turns if turn.role in ("user", "assistant")]
    while len(kept) > 1 and (sum(len(turn.content) for turn in kept) > LONGEST or kept[0].role != "user"):
        kept.pop(0)
    if not any(turn.role == "user" and turn.content.strip() for turn in kept):
        return (Message("user", judged.text),)
    return (*kept, Message("assistant", judged.text))


def stretches(text: str, parts: Sequence[str]) -> list[str]:
    """A text and, where there is more than one, the parts of it."""
    return [text, *parts] if len(parts) > 1 else [text]
