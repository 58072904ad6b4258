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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from tta_middleware.errors import ConfigurationError, EngineError, ModerationRejectedError, ModerationUnavailableError
from tta_middleware.moderation.cascade_bounds import CascadeBounds
from tta_middleware.moderation.judge_formats import JudgeFormat, format_for
from tta_middleware.moderation.judge_probe import JudgeProbe, Place, outstanding, windows
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
from tta_middleware.moderation.wrapper import Closing
from tta_middleware.protocols import Engine, ReasoningEngine
from tta_middleware.types import CATEGORIES, FloatMatrix, ModerationContext, PromptEmbeddings, Thought, Verdict

_REMEMBERED = 256
"""Verdicts on pieces of a request's texts that are not asked for again."""


@runtime_checkable
class AskingEngine(Engine, Protocol):
    """An engine that tells what its model would say next, without decoding."""

    async def token_ids(self, text: str) -> list[int]:
        """The tokens of a text by itself."""
        ...

    async def next_token_logprobs(
        self,
        prompts: Sequence[PromptEmbeddings],
        token_ids: Sequence[int],
        *,
        shared: int = 0,
        owner: int | None = None,
    ) -> list[list[float]]:
        """Per prompt, the log-probability in nats of each of ``token_ids`` as the next token.

        Args:
            shared: how many rows the prompts have in common with those of other callers.
            owner: a number under which what has run may be kept for the next prompt, until ``forget(owner)``, where
                the engine has that (:class:`KeepingEngine`).
        """
        ...


@runtime_checkable
class KeepingEngine(Protocol):
    """An engine that keeps what it has run of prompts for their owner."""

    def forget(self, owner: int) -> None:
        """Let go of what is kept for ``owner``; thread-safe, does not wait, never fails."""
        ...


@runtime_checkable
class StatesEngine(Engine, Protocol):
    """An engine that tells what its model makes the next token of: what a probe reads."""

    async def layer_count(self) -> int:
        """How many layers the model has."""
        ...

    async def hidden_states(
        self,
        prompts: Sequence[PromptEmbeddings],
        layers: Sequence[int] = (),
        *,
        spans: Sequence[Sequence[tuple[int, int]]] | None = None,
        shared: int = 0,
        owner: int | None = None,
    ) -> FloatMatrix:
        """(n, k * d), per prompt the states after k layers side by side, counted from 1; without any, after the last.

        Args:
            spans: of each prompt some of its rows, each from one to before another, over which the mean of the layers'
                values is taken in place of a state: a row for each span, those of the first prompt first.

        The other arguments are those of :meth:`AskingEngine.next_token_logprobs`.
        """
        ...


@runtime_checkable
class TemplateEngine(Protocol):
    """An engine whose chat template can be read, so that guard models are recognised."""

    async def chat_template(self) -> str:
        """Its text."""
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


@dataclass(frozen=True, slots=True)
class _Said:
    """How a model gives verdicts in its format: the first tokens, how unsafe each is, and what stands before them."""

    token_ids: tuple[int, ...]
    unsafe: tuple[float, ...]
    prefix: str

    def log_odds(self, logprobs: Sequence[float]) -> float:
        """Of unsafe against safe, in nats: the mass of the verdicts, those in between divided."""
        pairs = list(zip(logprobs, self.unsafe, strict=True))
        return _log_sum(pairs, lambda unsafe: unsafe) - _log_sum(pairs, lambda unsafe: 1.0 - unsafe)

    def mass(self, logprobs: Sequence[float]) -> float:
        """How surely the next token is a verdict."""
        return math.fsum(map(math.exp, logprobs))


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
        self._chat = ChatFormat(reads_prompt)
        # What is known of the model; shared with the judges of requests. What is found out twice is equal.
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
        if context.scope is not None and isinstance(self._engine, KeepingEngine):
            owner = context.scope.owner
            context.scope.at_end(("judge", id(self._engine)), partial(self._engine.forget, owner))
        return twin

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
        """(n, k * d) hidden states to fit a probe on; see :class:`StatesEngine`.

        Args:
            prompts: one per text, None where there is none.
            place: as of :class:`~tta_middleware.moderation.judge_probe.JudgeProbe`.

        Raises:
            ConfigurationError: the engine gives none, it has no such layer, a text is too long, or the number of
                prompts is another.
            EngineError: the engine failed.
        """
        judged = self._each(texts, prompts)
        if place == "verdict":
            return await self._states_of(judged, layers)
        asked = await self._asked_of(judged)
        return await self._read(asked, layers, [[await self._span(*pair)] for pair in zip(judged, asked, strict=True)])

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
        return await self._by_words(await self._asked_of(self._each(texts, prompts)))

    def wording(self) -> str:
        """16 hexadecimal digits for how this judge asks; what is fitted on one wording says nothing of another."""
        asked = [self._chat.harm(JudgedText("text", prompt)).messages[0].content for prompt in ("prompt", None)]
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
        cut = [pieces(text, stretches=probe is None or probe.place == "verdict") for text in texts]
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
        form = await self._format()
        if form.codes:
            return await self._shares_by_code(form, judged)
        asked = await self._asked_of([judged] * len(form.groups), [partial(_kind, form, name) for name in form.groups])
        odds = dict(zip(form.groups, await self._by_words(asked), strict=True))
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
        said, asked = await self._said(), form.harm(judged)
        prompt = JudgePrompt(asked.messages, said.prefix + form.codes_after, asked.template)
        first = {code: (await self._engine.token_ids(_after(form, code)))[0] for code in form.codes}
        [logprobs] = await self._ask([await self._embedded(prompt)], list(first.values()))
        top = max(logprobs)
        shares: dict[str, float] = {}
        for code, logprob in zip(first, logprobs, strict=True):
            category = form.codes[code]
            shares[category] = max(shares.get(category, 0.0), math.exp(logprob - top))
        return shares

    async def _harm(self, judged: Sequence[JudgedText]) -> list[float]:
        probe, words = self._calibration.probe, self._calibration.words
        if probe is None:
            return await self._by_words(await self._asked_of(judged))
        if probe.place == "verdict":
            known = probe.log_odds(await self._states_of(judged, probe.layers))
        else:
            known = await self._over_answers(judged, probe)
        if words:
            known = known + words * np.array(await self._by_words(await self._asked_of(judged)))
        found: list[float] = known.tolist()
        return found

    async def _breach(self, judged: Sequence[JudgedText]) -> list[float]:
        """Log-odds on the scale of those on harm: a text that breaks no rule is where a harmless one is."""
        form = await self._format()
        found = await self._by_words(await self._asked_of(judged, [form.breach] * len(judged)))
        if not form.leans:
            return found
        lean = await self._lean_of_rules()
        return [value - lean for value in found]

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
        if not (await self._format()).leans:
            return JudgeCalibration()
        [lean] = await self._harm([JudgedText(NEUTRAL)])
        return replace(given, centre=lean + given.centre, from_neutral=False)

    async def _lean_of_rules(self) -> float:
        """How much more the model says yes to these rules than to harm, of a text that is neither."""
        form, rules, subject = await self._format(), self._context.rules, self._context.subject
        key = f"rules {subject} {rules}"
        if key not in self._found:
            neutral = JudgedText(NEUTRAL, None, subject, rules)
            [harm] = await self._harm([neutral])
            [broken] = await self._by_words(await self._asked_of([neutral], [form.breach]))
            self._found[key] = broken - harm
        lean: float = self._found[key]
        return lean

    async def _lean_of_groups(self, judged: JudgedText) -> Mapping[str, float]:
        """How much the model says yes to each group of harm, of a text that is of none."""
        form, key = await self._format(), f"groups {judged.subject}"
        if key not in self._found:
            neutral = JudgedText(NEUTRAL, None, judged.subject)
            ways = [partial(_kind, form, name) for name in form.groups]
            odds = await self._by_words(await self._asked_of([neutral] * len(ways), ways))
            self._found[key] = dict(zip(form.groups, odds, strict=True))
        lean: Mapping[str, float] = self._found[key]
        return lean

    async def _format(self) -> JudgeFormat:
        if "format" not in self._found:
            engine: Any = self._engine
            known = isinstance(engine, TemplateEngine)
            self._found["format"] = format_for(await engine.chat_template(), self._chat) if known else self._chat
        form: JudgeFormat = self._found["format"]
        return form

    async def _thinks(self) -> bool:
        """Whether the model would think first; it is made to have done so, since its next token is the verdict."""
        if "thinks" not in self._found:
            engine: Engine = self._engine
            self._found["thinks"] = isinstance(engine, ReasoningEngine) and await engine.thinks()
        return bool(self._found["thinks"])

    async def _said(self) -> _Said:
        """How this model gives verdicts; found out once."""
        if "said" not in self._found:
            self._found["said"] = await self._find_said(await self._format())
        said: _Said = self._found["said"]
        return said

    async def _find_said(self, form: JudgeFormat) -> _Said:
        firsts: dict[int, set[float]] = {}
        for word, unsafe in form.spellings.items():
            firsts.setdefault((await self._engine.token_ids(word))[0], set()).add(unsafe)
        plain = {token: unsafe for token, [unsafe, *more] in firsts.items() if not more}
        if not {0.0, 1.0} <= set(plain.values()):
            raise ConfigurationError("its words for yes and no begin with the same token")
        ways = [_Said(tuple(plain), tuple(plain.values()), prefix) for prefix in form.prefixes]
        if len(ways) == 1:
            return ways[0]
        asked = form.harm(JudgedText(NEUTRAL, "What is the weather like?"))
        prompts = [await self._embedded(JudgePrompt(asked.messages, way.prefix, asked.template)) for way in ways]
        masses = await self._engine.next_token_logprobs(prompts, ways[0].token_ids)
        return max(zip(ways, masses, strict=True), key=lambda pair: pair[0].mass(pair[1]))[0]

    async def _asked_of(self, judged: Sequence[JudgedText], ways: Iterable[Any] = ()) -> list[PromptEmbeddings]:
        """A prompt per text whose next token is the verdict, on harm or as each of ``ways`` asks."""
        form, said = await self._format(), await self._said()
        chosen = list(ways) or [form.harm] * len(judged)
        asked = [way(one) for way, one in zip(chosen, judged, strict=True)]
        return [await self._embedded(JudgePrompt(one.messages, said.prefix, one.template)) for one in asked]

    async def _embedded(self, asked: JudgePrompt) -> PromptEmbeddings:
        engine, more = self._engine, dict[str, Any]()
        if asked.template:
            more["template"] = asked.template
        if await self._thinks():
            more["thought"] = Thought()
        return await engine.embed(asked.messages, assistant_prefix=asked.prefix, **more)

    async def _states_of(self, judged: Sequence[JudgedText], layers: Sequence[int]) -> FloatMatrix:
        asked = await self._asked_of(judged)
        return await self._read(asked, layers, None)

    async def _over_answers(self, judged: Sequence[JudgedText], probe: JudgeProbe) -> NDArray[np.float64]:
        """(n,) log-odds of each answer as a whole, or of the window of it that stands out."""
        asked = await self._asked_of(judged)
        spans = [windows(*await self._span(*pair)) for pair in zip(judged, asked, strict=True)]
        odds = probe.log_odds(await self._read(asked, probe.layers, spans))
        ends = np.cumsum([len(mine) for mine in spans])
        return np.array([outstanding(mine) for mine in np.split(odds, ends[:-1])])

    async def _read(
        self,
        asked: Sequence[PromptEmbeddings],
        layers: Sequence[int],
        spans: Sequence[Sequence[tuple[int, int]]] | None,
    ) -> FloatMatrix:
        engine: Engine = self._engine
        if not isinstance(engine, StatesEngine):
            raise ConfigurationError(f"{type(engine).__name__} has no hidden_states")
        return await engine.hidden_states(asked, layers, spans=spans, shared=_shared(asked), owner=self._owner)

    async def _span(self, judged: JudgedText, asked: PromptEmbeddings) -> tuple[int, int]:
        """Rows of the judged text, give or take one where a token spans its end: at least one."""
        around = (await self._format()).harm(judged).around
        if around is None:
            raise ConfigurationError("a guard model's own format has no place of the answer to be read by a probe")
        rows = asked.user_mask.nonzero()[0]
        before, after = [len(await self._engine.token_ids(text)) for text in around]
        start = int(rows[0]) + before
        return start, max(start + 1, int(rows[-1]) + 1 - after)

    async def _by_words(self, asked: Sequence[PromptEmbeddings]) -> list[float]:
        """Per prompt the log-odds of the verdict."""
        said = await self._said()
        return [said.log_odds(logprobs) for logprobs in await self._ask(asked, said.token_ids)]

    async def _ask(self, asked: Sequence[PromptEmbeddings], token_ids: Sequence[int]) -> list[list[float]]:
        return await self._engine.next_token_logprobs(asked, token_ids, shared=_shared(asked), owner=self._owner)

    @property
    def _owner(self) -> int | None:
        scope = self._context.scope
        return None if scope is None or scope.closed else scope.owner


def _kind(form: JudgeFormat, group: str, judged: JudgedText) -> JudgePrompt:
    return form.kind(judged, group)


def _after(form: JudgeFormat, code: str) -> str:
    """What comes next where the model names a category: its number after a letter, or a word after a colon."""
    return code[1:] if form.codes_after.endswith(code[0]) else f" {code}"


def _shared(prompts: Sequence[PromptEmbeddings]) -> int:
    """Rows before the first that is the user's: the template's own, which every judging prompt begins with."""
    return min((int(prompt.user_mask.argmax()) for prompt in prompts), default=0)


def _log_sum(pairs: Sequence[tuple[float, float]], weight: Callable[[float], float]) -> float:
    weighted = [logprob + math.log(weight(unsafe)) for logprob, unsafe in pairs if weight(unsafe) > 0.0]
    largest = max(weighted)
    return largest + math.log(math.fsum(math.exp(value - largest) for value in weighted))
