"""The undefended answer of one prompt, decoded once and shared by every method that is compared.

All methods begin with the same answer, so decoding it again for each would only cost time. The wrapper replays it to
whoever asks for exactly that sequence; every method still counts its tokens. It is replayed whole, so a guard that
would have dropped a flagged beginning early counts all of it: the same for every method.

In bfloat16 a greedy answer depends on what else is in the batch: sums are taken in another order and close calls fall
the other way. A run that goes on where it was cut off, or gets another method, must still begin with the same answers.
Decoded alone they are the same every time; that is what a run with one prompt at a time does. A run with several
decodes the first answers before everything else in fixed groups, which are the same whatever is left to do.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, cast

import numpy as np

from tta_middleware.protocols import Engine, ReasoningEngine
from tta_middleware.types import (
    Completion,
    FloatMatrix,
    GenerationRequest,
    IntVector,
    Message,
    PromptEmbeddings,
    Sampling,
    TextDelta,
    Thought,
)


class SharedFirst:
    """An engine that knows the answers to one unmoved prompt.

    Attributes:
        seconds: what decoding the prompt's last prepared answer took.
    """

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self.model_id = engine.model_id
        self.seconds = 0.0
        self._engine, self._clock = engine, clock
        self._answers: dict[Sampling, tuple[Completion, float]] = {}
        self._prompts: dict[tuple[Message, ...], PromptEmbeddings] = {}
        self._nlls: dict[tuple[int, ...], float] = {}
        self._matrix: FloatMatrix | None = None

    async def load(self) -> None:
        await self._engine.load()

    async def prepare(self, messages: Sequence[Message], sampling: Sampling) -> Completion:
        """Decode the answer to ``messages``, or find it; sets :attr:`seconds`.

        Raises:
            EngineError: the model failed.
        """
        prompt = await self.embed(messages)
        self._matrix = prompt.matrix
        key = _key(sampling)
        if key not in self._answers:
            started = self._clock()
            done = (await self._engine.generate_batch([GenerationRequest(prompt, sampling)]))[0]
            self._answers[key] = done, self._clock() - started
        done, self.seconds = self._answers[key]
        return done

    async def remember(
        self, messages: Sequence[Message], sampling: Sampling, answer: Completion, seconds: float
    ) -> None:
        """Take an answer to ``messages`` that was decoded elsewhere."""
        self._matrix = (await self.embed(messages)).matrix
        self._answers[_key(sampling)] = answer, seconds

    async def embed(
        self,
        messages: Sequence[Message],
        *,
        assistant_prefix: str = "",
        tools: Sequence[Mapping[str, Any]] = (),
        thought: Thought | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> PromptEmbeddings:
        asked: dict[str, Any] = {"tools": tools or None, "thought": thought, "template": template or None}
        more = {name: value for name, value in asked.items() if value is not None}
        if assistant_prefix or more:
            return await self._engine.embed(messages, assistant_prefix=assistant_prefix, **more)
        key = tuple(messages)
        if key not in self._prompts:
            self._prompts[key] = await self._engine.embed(messages)
        return self._prompts[key]

    async def thinks(self) -> bool:
        return isinstance(self._engine, ReasoningEngine) and await self._engine.thinks()

    async def close_thought(self, prompt: PromptEmbeddings, token_ids: Sequence[int]) -> PromptEmbeddings:
        return await cast("ReasoningEngine", self._engine).close_thought(prompt, token_ids)

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[TextDelta, None]:
        known = self._known(request)
        if known is not None:
            if known.reasoning:
                yield TextDelta(known.reasoning, known.token_ids[: known.lead], None, "reasoning")
            yield TextDelta(known.text, known.token_ids[known.lead :], known.finish_reason)
            return
        async with aclosing(self._engine.stream(request)) as deltas:
            async for delta in deltas:
                yield delta

    def stream_batch(self, requests: Sequence[GenerationRequest]) -> list[AsyncGenerator[TextDelta, None]]:
        return self._engine.stream_batch(requests)

    async def generate_batch(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        known = [self._known(request) for request in requests]
        unknown = [request for request, done in zip(requests, known, strict=True) if done is None]
        fresh = iter(await self._engine.generate_batch(unknown) if unknown else [])
        return [done or next(fresh) for done in known]

    async def mean_nll(self, prompt: PromptEmbeddings, completions: Sequence[Sequence[int]]) -> list[float]:
        """Remembers what it measured under the unmoved prompt: every method asks for the first answer's."""
        if self._matrix is None or not np.array_equal(prompt.matrix, self._matrix):
            return await self._engine.mean_nll(prompt, completions)
        unknown = [ids for ids in dict.fromkeys(map(tuple, completions)) if ids not in self._nlls]
        if unknown:
            self._nlls |= dict(zip(unknown, await self._engine.mean_nll(prompt, unknown), strict=True))
        return [self._nlls[tuple(ids)] for ids in completions]

    async def nearest_tokens(self, rows: FloatMatrix) -> IntVector:
        return await self._engine.nearest_tokens(rows)

    async def directions(self, words: Sequence[str]) -> FloatMatrix:
        return await self._engine.directions(words)

    async def aclose(self) -> None:
        """The engine is shared with other prompts and stays open."""

    def _known(self, request: GenerationRequest) -> Completion | None:
        answer = self._answers.get(_key(request.sampling))
        if answer is None or self._matrix is None or not np.array_equal(request.prompt.matrix, self._matrix):
            return None
        return answer[0]


async def decode_together(
    engines: Sequence[SharedFirst], conversations: Sequence[Sequence[Message]], samplings: Sequence[Sampling]
) -> None:
    """Decode the first answers of a group in one batch and give each engine its own; nothing else may be decoding.

    Raises:
        EngineError: the model failed.
    """
    started = time.monotonic()
    prompts = [await engine.embed(messages) for engine, messages in zip(engines, conversations, strict=True)]
    requests = [GenerationRequest(prompt, sampling) for prompt, sampling in zip(prompts, samplings, strict=True)]
    done = await engines[0].generate_batch(requests)
    seconds = (time.monotonic() - started) / len(engines)
    for engine, messages, sampling, answer in zip(engines, conversations, samplings, done, strict=True):
        await engine.remember(messages, sampling, answer, seconds)


def _key(sampling: Sampling) -> Sampling:
    """A greedy answer does not depend on the seed."""
    return sampling if sampling.temperature > 0 else replace(sampling, seed=0)
