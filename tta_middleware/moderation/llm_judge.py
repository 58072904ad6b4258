"""A model of this process as moderator: asked whether a text is harmful, and read by what it would say next.

    judge = LLMJudge(engine)                        # the engine that answers, say: its weights are loaded once
    judge = LLMJudge(engine, rules="No dosages of medicines. No advice on single shares.")

The score is the step from the log-odds of the verdict to a probability, so it is graded. The text comes first, the
question after it: a text that grows runs only what is new of it and the question. A verdict runs in the passes that
decode. How well this works is a matter of the model; docs/moderation.md has figures for a small one, which are poor.

Guard models are recognised by their chat templates and asked in their own formats
(:mod:`tta_middleware.moderation.judge_formats`), all others in plain words
(:mod:`tta_middleware.moderation.judge_prompts`).
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

from tta_middleware.errors import ConfigurationError, EngineError, ModerationRejectedError, ModerationUnavailableError
from tta_middleware.moderation.cascade_bounds import CascadeBounds
from tta_middleware.moderation.closing import Closing
from tta_middleware.moderation.judge_formats import JudgeFormat
from tta_middleware.moderation.judge_probe import JudgeProbe, Place
from tta_middleware.moderation.judge_prompts import (
    LONGEST,
    NEUTRAL,
    NO,
    YES,
    ChatFormat,
    JudgedText,
    JudgePrompt,
    pieces,
)
from tta_middleware.moderation.judge_reading import AskingEngine, JudgeReading, KeepingEngine, StatesEngine
from tta_middleware.protocols import Engine
from tta_middleware.types import CATEGORIES, FloatMatrix, ModerationContext, Verdict

_REMEMBERED = 256
"""Verdicts on pieces of a request's texts that are not asked for again."""


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
        cascade: where a cheap moderator in front of the judge is sure; a judge does not read it.
        from_neutral: ``centre`` counts from what the model says of a neutral sentence, which is asked once; guard
            models, which were trained to give verdicts, are read as they are instead.

    Raises:
        ConfigurationError: a number is not finite, ``scale`` is not above 0, or ``words`` is below 0.
    """

    centre: float = 0.0
    scale: float = 1.0
    probe: JudgeProbe | None = None
    words: float = 0.0
    wording: str = ""
    cascade: CascadeBounds | None = None
    from_neutral: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.centre) and math.isfinite(self.scale) and self.scale > 0.0):
            raise ConfigurationError("a judge's centre is a finite number, and its scale one above 0")
        if not (math.isfinite(self.words) and self.words >= 0.0):
            raise ConfigurationError("what a judge's words count beside its probe is a finite number of at least 0")

    def probability(self, log_odds: float) -> float:
        """Of harm, in [0, 1]."""
        step = (log_odds - self.centre) * self.scale
        return 1.0 / (1.0 + math.exp(-step)) if step >= 0.0 else math.exp(step) / (1.0 + math.exp(step))


UNFITTED = JudgeCalibration(centre=0.5, scale=4.0, from_neutral=True)
"""For a model of which nothing was measured. Of the one chat model that was looked at, harmless answers lie up to half
a nat above a neutral sentence, and nearly all answers below 0, where they would pass whatever they say."""


class LLMJudge(Closing):
    """A moderator that asks a model of this process.

    Its word on harm is the category ``unsafe``. Where that is high enough to decide anything, a second question tells
    which kinds of harm it is: categories of the OpenAI API get a share of the score, the likeliest all of it, and
    ``unsafe`` is left out where that one has a threshold of its own. Rules of a policy are the category ``rules``.

    Whatever a judged text says, control tokens in it are text, and it cannot open a turn of the judging prompt. It can
    still argue with its judge.

    Args:
        engine: of the model that is asked; it may answer at the same time.
        rules: what is not allowed besides harm, in the operator's words, where no policy says so.
        calibration: from log-odds to a score; see :class:`JudgeCalibration`.
        reads_prompt: whether what a text answers is put before it, where that is known.
        closes: whether closing the judge closes the engine.

    Attributes:
        origin: the judge that this one was before it was told of a request; None for one that was not.

    Raises:
        ConfigurationError: the engine cannot be asked, ``rules`` are blank or above ``LONGEST`` characters, or the
            calibration was fitted on another wording.
    """

    categories: tuple[str, ...] = ("unsafe", *CATEGORIES, "rules")
    max_characters: int | None = LONGEST
    reads_rules = True
    grows = True

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
        self.origin: LLMJudge | None = None
        self._engine, self._closes = engine, closes
        self._context = ModerationContext(rules=rules or "")
        self._calibration = calibration or JudgeCalibration()
        if self._calibration.probe is not None and not isinstance(engine, StatesEngine):
            raise ConfigurationError(f"{type(engine).__name__} has no hidden_states, so no probe can read its model")
        self._reading = JudgeReading(engine, ChatFormat(reads_prompt))
        # Of the calibration and the leans; shared with the judges of requests. What is found out twice is equal.
        self._found: dict[str, Any] = {}
        # Log-odds of whole stretches; of one request.
        self._known: dict[tuple[str, str, str | None], float] = {}
        if self._calibration.wording not in ("", self.wording()):
            raise ConfigurationError(
                f"what was fitted of {engine.model_id} as a judge belongs to another wording of the question; "
                "fit it anew with tta calibrate"
            )

    def in_context(self, context: ModerationContext) -> Self:
        """This judge, told what the texts are and what is not allowed; see :class:`ModerationContext`."""
        twin = copy.copy(self)
        twin.origin, twin._known = self, {}
        twin._context = context if context.rules else replace(context, rules=self._context.rules)
        twin._reading = replace(self._reading, scope=context.scope)
        if context.scope is not None and isinstance(self._engine, KeepingEngine):
            owner = context.scope.owner
            context.scope.at_end(("judge", id(self._engine)), partial(self._engine.forget, owner))
        return twin

    async def load(self) -> None:
        """Load the judging model."""
        await self._engine.load()

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        """One verdict per text, all asked for side by side.

        Raises:
            ModerationUnavailableError: the engine failed.
            ModerationRejectedError: a text does not fit the model's context, the model has no word for yes or no, or it
                is a guard model that reads no rules.
        """
        if not texts:
            return []
        try:
            return await self._verdicts(texts, prompt)
        except EngineError as error:
            raise ModerationUnavailableError(f"the judging model failed: {error}", cause="engine") from error
        except ConfigurationError as error:
            raise ModerationRejectedError(f"the judging model cannot be asked: {error}") from error

    async def states(
        self,
        texts: Sequence[str],
        prompts: Sequence[str | None],
        layers: Sequence[int] = (),
        *,
        place: Place = "verdict",
    ) -> FloatMatrix:
        """(n, k * d) hidden states to fit a probe on, as :mod:`tta_middleware.moderation.judge_reading` describes them.

        Args:
            prompts: one per text, None where there is none.
            place: as of :class:`~tta_middleware.moderation.judge_probe.JudgeProbe`.

        Raises:
            ConfigurationError: the engine gives none, it has no such layer, a text is too long, or the number of
                prompts is another.
            EngineError: the engine failed.
        """
        return await self._reading.states(self._each(texts, prompts), layers, place)

    async def layer_count(self) -> int:
        """How many layers' states :meth:`states` can give; 0 where the engine gives none."""
        engine: Engine = self._engine
        return await engine.layer_count() if isinstance(engine, StatesEngine) else 0

    async def has_values(self) -> bool:
        """Whether :meth:`states` can be taken over the answer: not of guard models, nor where no pass is packed."""
        try:
            await self.states([NEUTRAL], [None], [1], place="answer")
        except ConfigurationError:
            return False
        return True

    async def log_odds(self, texts: Sequence[str], prompts: Sequence[str | None]) -> list[float]:
        """Log-odds of yes against no in nats, before any calibration; texts and prompts as for :meth:`states`.

        Raises:
            ConfigurationError: a text is too long, the two differ in number, or the model has no word for yes or no.
            EngineError: the engine failed.
        """
        return await self._reading.log_odds(self._each(texts, prompts))

    def wording(self) -> str:
        """16 hexadecimal digits for how this judge asks; what is fitted on one wording says nothing of another."""
        chat = self._reading.chat
        asked = [chat.harm(JudgedText("text", prompt)).messages[0].content for prompt in ("prompt", None)]
        return hashlib.sha256("\0".join((*asked, *YES, *NO)).encode()).hexdigest()[:16]

    async def aclose(self) -> None:
        """Close the engine, if it is this judge's."""
        if self._closes:
            await self._engine.aclose()

    def _each(self, texts: Sequence[str], prompts: Sequence[str | None]) -> list[JudgedText]:
        if len(texts) != len(prompts):
            raise ConfigurationError("a judge takes one prompt per text; give None where a text answers nothing")
        return [self._judged(text, prompt) for text, prompt in zip(texts, prompts, strict=True)]

    def _judged(self, text: str, prompt: str | None) -> JudgedText:
        context = self._context
        return JudgedText(text, prompt, context.subject, context.rules, context.conversation)

    async def _verdicts(self, texts: Sequence[str], prompt: str | None) -> list[Verdict]:
        """Each text by its worst piece."""
        probe = self._calibration.probe
        cut = [pieces(text, stretches=probe is None or not probe.reads_windows) for text in texts]
        judged = [self._judged(piece, prompt) for mine in cut for piece in mine]
        harm = await self._once("harm", judged, self._harm)
        broken = await self._once("rules", judged, self._breach) if self._context.rules else harm
        step = await self._step()
        found, at = [], 0
        for of_text in cut:
            mine = slice(at, at := at + len(of_text))
            worst = max(range(mine.start, mine.stop), key=harm.__getitem__)
            scores = await self._scores(judged[worst], step.probability(harm[worst]))
            if self._context.rules:
                scores["rules"] = step.probability(max(broken[mine]))
            flagged = max(scores.values()) >= self.default_threshold
            found.append(Verdict(scores, flagged, self._engine.model_id))
        return found

    async def _once(self, question: str, judged: Sequence[JudgedText], ask: Any) -> list[float]:
        """Log-odds of each; of a request's stretches that were asked about already, from memory."""
        keys = [(question, one.text, one.prompt) for one in judged]
        known = {key: self._known[key] for key in keys if key in self._known}
        new = {key: one for key, one in zip(keys, judged, strict=True) if key not in known}
        if new:
            known |= zip(new, await ask(list(new.values())), strict=True)
        if self._context.scope is not None:
            self._known |= known
            while len(self._known) > _REMEMBERED:
                self._known.pop(next(iter(self._known)))
        return [known[key] for key in keys]

    async def _scores(self, judged: JudgedText, harm: float) -> dict[str, float]:
        """By category. Which kind of harm it is, is asked only where ``harm`` decides something."""
        context = self._context
        least = self.default_threshold if context.least is None else context.least
        if harm < least:
            return {"unsafe": harm}
        shares = await self._shares(judged)
        explained = max(shares, key=shares.__getitem__, default="") in context.kinds
        scores = {name: harm * share for name, share in shares.items()}
        return scores if explained else {"unsafe": harm, **scores}

    async def _shares(self, judged: JudgedText) -> dict[str, float]:
        """Of the score, per category that the format tells: 1 for the likeliest, less for what is less likely."""
        form = await self._reading.format()
        if form.codes:
            return await self._shares_by_code(form, judged)
        odds = await self._odds_of_groups(form, judged)
        if form.leans:
            lean = await self._lean_of_groups(judged)
            odds = {name: value - lean[name] for name, value in odds.items()}
        likely = {
            category: min(odds[name] for name in groups) for category, groups in form.categories.items() if groups
        }
        top = max(likely.values(), default=0.0)
        # Nothing is likelier than of a text about the weather: then it is harm of no kind that is known here.
        if form.leans and top <= 0.0:
            return {}
        return {category: math.exp(value - top) for category, value in likely.items()}

    async def _shares_by_code(self, form: JudgeFormat, judged: JudgedText) -> dict[str, float]:
        logprobs = await self._reading.code_logprobs(judged)
        top = max(logprobs.values())
        shares: dict[str, float] = {}
        for code, logprob in logprobs.items():
            category = form.codes[code]
            shares[category] = max(shares.get(category, 0.0), math.exp(logprob - top))
        return shares

    async def _harm(self, judged: Sequence[JudgedText]) -> list[float]:
        return await self._reading.harm(judged, self._calibration.probe, self._calibration.words)

    async def _breach(self, judged: Sequence[JudgedText]) -> list[float]:
        """Log-odds on the scale of those on harm: a text that breaks no rule is where a harmless one is."""
        form = await self._reading.format()
        found = await self._reading.log_odds(judged, [form.breach] * len(judged))
        if not form.leans:
            return found
        lean = await self._lean_of_rules()
        return [value - lean for value in found]

    async def _odds_of_groups(self, form: JudgeFormat, judged: JudgedText) -> dict[str, float]:
        ways = [partial(_kind, form, name) for name in form.groups]
        return dict(zip(form.groups, await self._reading.log_odds([judged] * len(ways), ways), strict=True))

    async def _step(self) -> JudgeCalibration:
        """The calibration; one that counts from a neutral sentence is made with the first verdict."""
        given = self._calibration
        if not given.from_neutral:
            return given
        if "step" not in self._found:
            self._found["step"] = await self._step_from_neutral(given)
        step: JudgeCalibration = self._found["step"]
        return step

    async def _step_from_neutral(self, given: JudgeCalibration) -> JudgeCalibration:
        if not (await self._reading.format()).leans:
            return JudgeCalibration()
        [lean] = await self._harm([JudgedText(NEUTRAL)])
        return replace(given, centre=lean + given.centre, from_neutral=False)

    async def _lean_of_rules(self) -> float:
        """How much more the model says yes to these rules than to harm, of a text that is neither."""
        form, rules, subject = await self._reading.format(), self._context.rules, self._context.subject
        key = f"rules {subject} {rules}"
        if key not in self._found:
            neutral = JudgedText(NEUTRAL, None, subject, rules)
            [harm] = await self._harm([neutral])
            [broken] = await self._reading.log_odds([neutral], [form.breach])
            self._found[key] = broken - harm
        lean: float = self._found[key]
        return lean

    async def _lean_of_groups(self, judged: JudgedText) -> Mapping[str, float]:
        """How much the model says yes to each group of harm, of a text that is of none."""
        form, key = await self._reading.format(), f"groups {judged.subject}"
        if key not in self._found:
            self._found[key] = await self._odds_of_groups(form, JudgedText(NEUTRAL, None, judged.subject))
        lean: Mapping[str, float] = self._found[key]
        return lean


def _kind(form: JudgeFormat, group: str, judged: JudgedText) -> JudgePrompt:
    return form.kind(judged, group)
