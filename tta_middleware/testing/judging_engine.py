"""A scripted engine that can be asked, as :class:`~tta_middleware.moderation.llm_judge.LLMJudge` asks: no model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from tta_middleware.testing.scripted_engine import Script, ScriptedEngine
from tta_middleware.types import FloatMatrix, PromptEmbeddings

YES = frozenset({"yes", "Yes", "YES"})


def saying_yes_to(word: str, yes: float = 0.9, no: float = 0.2) -> Callable[[str], float]:
    """The probability of yes: ``yes`` where a question holds ``word``, else ``no``."""
    return lambda question: yes if word in question else no


class JudgingEngine(ScriptedEngine):
    """Answers by a script, and judges by a function of what it is asked.

    Args:
        script: as :class:`~tta_middleware.testing.scripted_engine.ScriptedEngine` takes it.
        yes: the probability that the next token of a prompt, whose text it is given, says yes; by default 0.9 where it
            holds ``flagme``, else 0.2.
        error: raised in place of a verdict.

    Attributes:
        questions: the prompts whose next token was asked for, as text, in order.
        owners: who asked each of them.
        spans: what was read of prompts, as text.
        forgotten: owners that said they were done.
        closed: whether it was closed.
    """

    def __init__(
        self,
        script: Script = "flagme",
        yes: Callable[[str], float] | None = None,
        *,
        error: Exception | None = None,
    ) -> None:
        super().__init__(script)
        self.yes, self.error = yes or saying_yes_to("flagme"), error
        self.questions: list[str] = []
        self.owners: list[int | None] = []
        self.spans: list[str] = []
        self.forgotten: list[int] = []

    async def token_ids(self, text: str) -> list[int]:
        """Words that mean yes begin with a token that others do not have."""
        return self.tokens(text)

    async def next_token_logprobs(
        self,
        prompts: Sequence[PromptEmbeddings],
        token_ids: Sequence[int],
        *,
        shared: int = 0,
        owner: int | None = None,
    ) -> list[list[float]]:
        """``yes`` shared out among the asked tokens that say yes, the rest among the others."""
        meaning = [self.text([token]) in YES for token in token_ids]
        asked = [self._asked(prompt, owner) for prompt in prompts]
        return [[self._logprob(self.yes(question), says_yes, meaning) for says_yes in meaning] for question in asked]

    async def layer_count(self) -> int:
        """Two, which give the same."""
        return 2

    async def hidden_states(
        self,
        prompts: Sequence[PromptEmbeddings],
        layers: Sequence[int] = (),
        *,
        spans: Sequence[Sequence[tuple[int, int]]] | None = None,
        shared: int = 0,
        owner: int | None = None,
    ) -> FloatMatrix:
        """(n, 2 * k): one, and the log-odds of yes, for each of k layers; of spans, whose words are noted, those of yes
        to their words.
        """
        asked = [self._asked(prompt, owner) for prompt in prompts]
        if spans is not None:
            pairs = [(prompt, span) for prompt, mine in zip(prompts, spans, strict=True) for span in mine]
            asked = [self.text(prompt.token_ids[start:end].tolist()) for prompt, (start, end) in pairs]
            self.spans += asked
        odds = map(self.yes, asked)
        return np.array([[1.0, math.log(p / (1.0 - p))] * max(1, len(layers)) for p in odds], dtype=np.float32)

    def forget(self, owner: int) -> None:
        """Nothing is kept; whoever is forgotten is noted."""
        self.forgotten.append(owner)

    def _asked(self, prompt: PromptEmbeddings, owner: int | None) -> str:
        if self.error is not None:
            raise self.error
        question = self.text(prompt.token_ids.tolist())
        self.questions.append(question)
        self.owners.append(owner)
        return question

    @staticmethod
    def _logprob(yes: float, says_yes: bool, meaning: Sequence[bool]) -> float:
        share = (yes if says_yes else 1.0 - yes) / meaning.count(says_yes)
        return math.log(share) if share > 0.0 else -1e4
