"""What a model of this process says of texts: the words that it would say next, and the states that it makes of them.

A :class:`JudgeReading` asks the engine, each text first and the question after it, in the format that the model's chat
template tells; whether that is harm, :class:`~tta_middleware.moderation.llm_judge.LLMJudge` decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from tta_middleware.errors import ConfigurationError
from tta_middleware.moderation.judge_formats import JudgeFormat, format_for
from tta_middleware.moderation.judge_probe import JudgeProbe, Place, outstanding, windows
from tta_middleware.moderation.judge_prompts import NEUTRAL, ChatFormat, JudgedText, JudgePrompt
from tta_middleware.protocols import Engine, ReasoningEngine
from tta_middleware.types import FloatMatrix, PromptEmbeddings, RequestScope, Thought


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


AskingWay: TypeAlias = Callable[[JudgedText], JudgePrompt]
"""Puts a question to a model about a text."""


@dataclass(frozen=True, slots=True)
class VerdictWords:
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


@dataclass(frozen=True, slots=True, eq=False)
class JudgeReading:
    """A model that is read.

    Attributes:
        chat: how a model is asked that is no guard model.
        scope: the request for which the engine may keep what has run; None where there is none.
    """

    engine: AskingEngine
    chat: ChatFormat
    scope: RequestScope | None = None
    # What is known of the model; shared by the readings of requests. What is found out twice is equal.
    _found: dict[str, Any] = field(default_factory=dict)

    async def log_odds(self, judged: Sequence[JudgedText], ways: Sequence[AskingWay] = ()) -> list[float]:
        """Per text the log-odds of the verdict in nats, on harm or as each of ``ways`` asks.

        Raises:
            ConfigurationError: the model has no word for yes or no.
            EngineError: the engine failed.
        """
        said = await self.verdict_words()
        asked = await self._asked(judged, ways)
        return [said.log_odds(logprobs) for logprobs in await self._ask(asked, said.token_ids)]

    async def harm(self, judged: Sequence[JudgedText], probe: JudgeProbe | None, words: float) -> list[float]:
        """Per text the log-odds of harm: of the probe, beside which the words count ``words``; of these without one."""
        if probe is None:
            return await self.log_odds(judged)
        read = self._over_windows if probe.reads_windows else self._at_verdicts
        known = await read(judged, probe)
        if words:
            known = known + words * np.array(await self.log_odds(judged))
        found: list[float] = known.tolist()
        return found

    async def code_logprobs(self, judged: JudgedText) -> dict[str, float]:
        """By code, the log-probability in nats that the model names that category, once it has said that it is harm."""
        form, said = await self.format(), await self.verdict_words()
        asked = form.harm(judged)
        prompt = JudgePrompt(asked.messages, said.prefix + form.codes_after, asked.template)
        firsts = [(await self.engine.token_ids(_after(form, code)))[0] for code in form.codes]
        [logprobs] = await self._ask([await self._embedded(prompt)], firsts)
        return dict(zip(form.codes, logprobs, strict=True))

    async def states(self, judged: Sequence[JudgedText], layers: Sequence[int], place: Place) -> FloatMatrix:
        """(n, k * d) what a probe of that place reads of whole texts; see :class:`StatesEngine`.

        Raises:
            ConfigurationError: the engine gives no states, or has no such layer, or the format no such place.
            EngineError: the engine failed.
        """
        asked = await self._asked(judged)
        if place == "verdict":
            return await self._read(asked, layers, None)
        return await self._read(asked, layers, [[await self._span(*pair)] for pair in zip(judged, asked, strict=True)])

    async def format(self) -> JudgeFormat:
        """How this model is asked; found out once."""
        if "format" not in self._found:
            engine: Any = self.engine
            known = isinstance(engine, TemplateEngine)
            self._found["format"] = format_for(await engine.chat_template(), self.chat) if known else self.chat
        form: JudgeFormat = self._found["format"]
        return form

    async def _at_verdicts(self, judged: Sequence[JudgedText], probe: JudgeProbe) -> NDArray[np.float64]:
        """(n,) log-odds of each text."""
        return probe.log_odds(await self.states(judged, probe.layers, "verdict"))

    async def _over_windows(self, judged: Sequence[JudgedText], probe: JudgeProbe) -> NDArray[np.float64]:
        """(n,) log-odds of each text as a whole, or of the window of it that stands out."""
        asked = await self._asked(judged)
        spans = [windows(*await self._span(*pair)) for pair in zip(judged, asked, strict=True)]
        odds = probe.log_odds(await self._read(asked, probe.layers, spans))
        ends = np.cumsum([len(mine) for mine in spans])
        return np.array([outstanding(mine) for mine in np.split(odds, ends[:-1])])

    async def _thinks(self) -> bool:
        """Whether the model would think first; it is made to have done so, since its next token is the verdict."""
        if "thinks" not in self._found:
            engine: Engine = self.engine
            self._found["thinks"] = isinstance(engine, ReasoningEngine) and await engine.thinks()
        return bool(self._found["thinks"])

    async def verdict_words(self) -> VerdictWords:
        """How this model gives verdicts; found out once."""
        if "said" not in self._found:
            self._found["said"] = await self._find_said(await self.format())
        said: VerdictWords = self._found["said"]
        return said

    async def _find_said(self, form: JudgeFormat) -> VerdictWords:
        firsts: dict[int, set[float]] = {}
        for word, unsafe in form.spellings.items():
            firsts.setdefault((await self.engine.token_ids(word))[0], set()).add(unsafe)
        plain = {token: unsafe for token, [unsafe, *more] in firsts.items() if not more}
        if not {0.0, 1.0} <= set(plain.values()):
            raise ConfigurationError("its words for yes and no begin with the same token")
        ways = [VerdictWords(tuple(plain), tuple(plain.values()), prefix) for prefix in form.prefixes]
        if len(ways) == 1:
            return ways[0]
        asked = form.harm(JudgedText(NEUTRAL, "What is the weather like?"))
        prompts = [await self._embedded(JudgePrompt(asked.messages, way.prefix, asked.template)) for way in ways]
        masses = await self.engine.next_token_logprobs(prompts, ways[0].token_ids)
        return max(zip(ways, masses, strict=True), key=lambda pair: pair[0].mass(pair[1]))[0]

    async def _asked(self, judged: Sequence[JudgedText], ways: Sequence[AskingWay] = ()) -> list[PromptEmbeddings]:
        """A prompt per text whose next token is the verdict, on harm or as each of ``ways`` asks."""
        form, said = await self.format(), await self.verdict_words()
        chosen = ways or [form.harm] * len(judged)
        asked = [way(one) for way, one in zip(chosen, judged, strict=True)]
        return [await self._embedded(JudgePrompt(one.messages, said.prefix, one.template)) for one in asked]

    async def _embedded(self, asked: JudgePrompt) -> PromptEmbeddings:
        engine, more = self.engine, dict[str, Any]()
        if asked.template:
            more["template"] = asked.template
        if await self._thinks():
            more["thought"] = Thought()
        return await engine.embed(asked.messages, assistant_prefix=asked.prefix, **more)

    async def _read(
        self,
        asked: Sequence[PromptEmbeddings],
        layers: Sequence[int],
        spans: Sequence[Sequence[tuple[int, int]]] | None,
    ) -> FloatMatrix:
        engine: Engine = self.engine
        if not isinstance(engine, StatesEngine):
            raise ConfigurationError(f"{type(engine).__name__} has no hidden_states")
        return await engine.hidden_states(asked, layers, spans=spans, shared=_shared(asked), owner=self._owner)

    async def _span(self, judged: JudgedText, asked: PromptEmbeddings) -> tuple[int, int]:
        """Rows of the judged text, give or take one where a token spans its end: at least one."""
        around = (await self.format()).harm(judged).around
        if around is None:
            raise ConfigurationError("a guard model's own format has no place of the answer to be read by a probe")
        rows = asked.user_mask.nonzero()[0]
        before, after = [len(await self.engine.token_ids(text)) for text in around]
        start = int(rows[0]) + before
        return start, max(start + 1, int(rows[-1]) + 1 - after)

    async def _ask(self, asked: Sequence[PromptEmbeddings], token_ids: Sequence[int]) -> list[list[float]]:
        return await self.engine.next_token_logprobs(asked, token_ids, shared=_shared(asked), owner=self._owner)

    @property
    def _owner(self) -> int | None:
        return None if self.scope is None or self.scope.closed else self.scope.owner


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
