"""A chat model of this process as moderator: asked whether a text is harmful, and read by what it would say next.

    judge = LLMJudge(engine)                        # the engine that answers, say: its weights are loaded once
    judge = LLMJudge(engine, rules="No dosages of medicines. No advice on single shares.")

The score is the step from the log-odds of "yes" against "no" to a probability, so it is graded. The text comes first,
the question after it: a text that grows runs only what is new of it and the question. A verdict runs in the passes that
decode. How well this works is a matter of the model; docs/moderation.md has figures for a small one, which are poor.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from tta_middleware.errors import ConfigurationError, EngineError, ModerationRejectedError, ModerationUnavailableError
from tta_middleware.moderation.judge_probe import JudgeProbe
from tta_middleware.moderation.wrapper import Closing
from tta_middleware.protocols import Engine
from tta_middleware.types import FloatMatrix, Message, PromptEmbeddings, Verdict

LONGEST = 4_000
"""Characters of a text, and of the end of what it answers, that are put before the model at once."""

QUESTION = "Does the answer give help that could cause harm? Answer yes or no."
QUESTION_ON_RULES = "Does the answer do what is not allowed? Answer yes or no."

YES, NO = ("yes", "Yes", "YES"), ("no", "No", "NO")


@runtime_checkable
class AskingEngine(Engine, Protocol):
    """An engine that tells what its model would say next, without decoding."""

    async def token_ids(self, text: str) -> list[int]:
        """The tokens of a text by itself."""
        ...

    async def next_token_logprobs(
        self, prompts: Sequence[PromptEmbeddings], token_ids: Sequence[int]
    ) -> list[list[float]]:
        """Per prompt, the log-probability in nats of each of ``token_ids`` as the next token."""
        ...


@runtime_checkable
class StatesEngine(Engine, Protocol):
    """An engine that tells what its model makes the next token of: what a probe reads."""

    async def last_hidden_states(self, prompts: Sequence[PromptEmbeddings]) -> FloatMatrix:
        """(n, d), per prompt."""
        ...


@dataclass(frozen=True, slots=True)
class JudgeCalibration:
    """The step from log-odds to the probability that a text is harmful: ``sigmoid((log_odds - centre) * scale)``.

    Attributes:
        centre: log-odds, in nats, that count as even. Chat models lean to one answer, so 0 is seldom right.
        scale: steepness; above 0.
        probe: takes the log-odds from the model's hidden state instead of its yes and no; see
            :mod:`tta_middleware.moderation.judge_probe`.
        words: how much the log-odds of yes against no count beside the probe's; 0 and they are not asked for.
        wording: :meth:`LLMJudge.wording` of the judge that this was fitted for; empty and it is not checked.

    Raises:
        ConfigurationError: a number is not finite, ``scale`` is not above 0, or ``words`` is below 0.
    """

    centre: float = 0.0
    scale: float = 1.0
    probe: JudgeProbe | None = None
    words: float = 0.0
    wording: str = ""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.centre) and math.isfinite(self.scale) and self.scale > 0.0):
            raise ConfigurationError("a judge's centre is a finite number, and its scale one above 0")
        if not (math.isfinite(self.words) and self.words >= 0.0):
            raise ConfigurationError("what a judge's words count beside its probe is a finite number of at least 0")

    def probability(self, log_odds: float) -> float:
        """Of harm, in [0, 1]."""
        step = (log_odds - self.centre) * self.scale
        return 1.0 / (1.0 + math.exp(-step)) if step >= 0.0 else math.exp(step) / (1.0 + math.exp(step))


class LLMJudge(Closing):
    """A moderator that asks a chat model; its one category is ``unsafe``.

    Whatever a judged text says, control tokens in it are text. A text can still argue with its judge.

    Args:
        engine: of the model that is asked; it may answer at the same time.
        rules: what is not allowed, in the operator's words; without, the question is about harm.
        calibration: from log-odds to a score; see :class:`JudgeCalibration`.
        reads_prompt: whether what a text answers is put before it, where that is known.
        closes: whether closing the judge closes the engine.

    Raises:
        ConfigurationError: the engine cannot be asked, ``rules`` are blank or above ``LONGEST`` characters, or the
            calibration was fitted on another wording.
    """

    categories: tuple[str, ...] = ("unsafe",)
    max_characters: int | None = LONGEST

    def __init__(
        self,
        engine: Engine,
        *,
        rules: str | None = None,
        calibration: JudgeCalibration | None = None,
        name: str = "llm-judge",
        default_threshold: float = 0.5,
        reads_prompt: bool = True,
        closes: bool = False,
    ) -> None:
        if not isinstance(engine, AskingEngine):
            kind = type(engine).__name__
            raise ConfigurationError(f"{kind} has no next_token_logprobs and token_ids, so its model cannot judge")
        if rules is not None and not (rules.strip() and len(rules) <= LONGEST):
            raise ConfigurationError(f"rules say what is not allowed, in 1 to {LONGEST:,} characters")
        self.name, self.default_threshold = name, default_threshold
        self._engine, self._rules = engine, rules
        self._calibration = calibration or JudgeCalibration()
        if self._calibration.probe is not None and not isinstance(engine, StatesEngine):
            raise ConfigurationError(
                f"{type(engine).__name__} has no last_hidden_states, so no probe can read its model"
            )
        self._reads_prompt, self._closes = reads_prompt, closes
        if self._calibration.wording not in ("", self.wording()):
            raise ConfigurationError(
                f"what was fitted of {engine.model_id} as a judge belongs to another wording of the question; "
                "fit it anew with tta calibrate"
            )

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        """One verdict per text, all asked for side by side.

        Raises:
            ModerationUnavailableError: the engine failed.
            ModerationRejectedError: a text does not fit the model's context, or the model has no word for yes or no.
        """
        if not texts:
            return []
        try:
            asked = [await self._embedded(text, prompt) for text in texts]
            found = await self._log_odds(asked)
        except EngineError as error:
            raise ModerationUnavailableError(f"the judging model failed: {error}", cause="engine") from error
        except ConfigurationError as error:
            raise ModerationRejectedError(f"the judging model cannot be asked: {error}") from error
        return [self._verdict(log_odds) for log_odds in found]

    async def states(self, texts: Sequence[str], prompts: Sequence[str | None]) -> FloatMatrix:
        """(n, d) hidden states at the verdict's place, to fit a probe on; a prompt per text, None where there is none.

        Raises:
            ConfigurationError: the engine gives none, a text is too long, or the two differ in number.
            EngineError: the engine failed.
        """
        return await self._states_of(await self._each_embedded(texts, prompts))

    async def log_odds(self, texts: Sequence[str], prompts: Sequence[str | None]) -> list[float]:
        """Log-odds of yes against no in nats, before any calibration; texts and prompts as for :meth:`states`.

        Raises:
            ConfigurationError: a text is too long, the two differ in number, or the model has no word for yes or no.
            EngineError: the engine failed.
        """
        return await self._by_words(await self._each_embedded(texts, prompts))

    def wording(self) -> str:
        """16 hexadecimal digits for how this judge asks; what is fitted on one wording says nothing of another."""
        asked = (self._asked("text", "prompt"), self._asked("text", None), *YES, *NO)
        return hashlib.sha256("\0".join(asked).encode()).hexdigest()[:16]

    async def aclose(self) -> None:
        """Close the engine, if it is this judge's."""
        if self._closes:
            await self._engine.aclose()

    def _asked(self, text: str, prompt: str | None) -> str:
        """Everything that stays the same while a text grows stands before it."""
        rules = f"This is not allowed:\n{self._rules}\n\n" if self._rules else ""
        question = f"Question: {prompt[-LONGEST:]}\n\n" if prompt and self._reads_prompt else ""
        return f"{rules}{question}Answer: {text}\n\n{QUESTION_ON_RULES if self._rules else QUESTION}"

    async def _each_embedded(self, texts: Sequence[str], prompts: Sequence[str | None]) -> list[PromptEmbeddings]:
        if len(texts) != len(prompts):
            raise ConfigurationError("a judge takes one prompt per text; give None where a text answers nothing")
        return [await self._embedded(text, prompt) for text, prompt in zip(texts, prompts, strict=True)]

    async def _log_odds(self, asked: Sequence[PromptEmbeddings]) -> list[float]:
        probe, words = self._calibration.probe, self._calibration.words
        if probe is None:
            return await self._by_words(asked)
        known = probe.log_odds(await self._states_of(asked))
        if words:
            known = known + words * np.array(await self._by_words(asked))
        found: list[float] = known.tolist()
        return found

    async def _embedded(self, text: str, prompt: str | None) -> PromptEmbeddings:
        return await self._engine.embed([Message("user", self._asked(text, prompt))])

    async def _states_of(self, asked: Sequence[PromptEmbeddings]) -> FloatMatrix:
        engine: Engine = self._engine
        if not isinstance(engine, StatesEngine):
            raise ConfigurationError(f"{type(engine).__name__} has no last_hidden_states")
        return await engine.last_hidden_states(asked)

    async def _by_words(self, asked: Sequence[PromptEmbeddings]) -> list[float]:
        """Per prompt the log-odds of yes against no."""
        yes, no = await self._verdict_tokens()
        found = await self._engine.next_token_logprobs(asked, [*yes, *no])
        return [_log_sum(logprobs[: len(yes)]) - _log_sum(logprobs[len(yes) :]) for logprobs in found]

    async def _verdict_tokens(self) -> tuple[list[int], list[int]]:
        """The first tokens of the words for yes and for no; none of one may be among the other's."""
        yes, no = [list({(await self._engine.token_ids(word))[0] for word in words}) for words in (YES, NO)]
        if set(yes) & set(no):
            raise ConfigurationError("its words for yes and no begin with the same token")
        return yes, no

    def _verdict(self, log_odds: float) -> Verdict:
        score = self._calibration.probability(log_odds)
        return Verdict({"unsafe": score}, score >= self.default_threshold, self._engine.model_id)


def _log_sum(nats: Sequence[float]) -> float:
    largest = max(nats)
    return largest + math.log(sum(math.exp(value - largest) for value in nats))
